"""HTTP and gRPC in front of the service."""
