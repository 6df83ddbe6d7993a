"""What Ray Serve's gRPC proxy adds to its server: the protocol's service, with messages that travel to a replica.

The messages of `tritonclient` name a module that does not exist (`grpc_service_pb2`), so that pickle, by which Ray
sends them, cannot find their classes. They are told their true one.
"""

from typing import Any

from tritonclient.grpc import service_pb2, service_pb2_grpc

METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "RepositoryIndex",
)
"""Those that are offered, as in `grpc_app`."""


def add_to_server(servicer: Any, server: Any) -> None:
    """Ray calls it in each proxy, with its own servicer and server."""
    for name in METHODS:
        getattr(service_pb2, f"{name}Request").__module__ = service_pb2.__name__
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
