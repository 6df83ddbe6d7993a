"""The function by which Ray Serve's gRPC proxy adds the protocol's service.

Ray pickles the messages to send them to a replica. The messages of `tritonclient` name a module that does not exist
(`grpc_service_pb2`), so pickle could not find their classes. Their `__module__` is corrected here.
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
"""The supported methods, as in `grpc_app`."""


def add_to_server(servicer: Any, server: Any) -> None:
    """Add the service to a gRPC server. Ray calls this in each proxy."""
    for name in METHODS:
        getattr(service_pb2, f"{name}Request").__module__ = service_pb2.__name__
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
