"""A request that is not answered with outputs: the status and the words of the protocol's error object."""


class Refusal(Exception):  # noqa: N818 - what is wrong is the request, not the server
    """A request that gets an error object.

    Args:
        status: of HTTP; gRPC's is derived from it.
        message: what came, what was expected.
        retry_after: seconds after which it may be worth trying again; 0 says nothing.
    """

    def __init__(self, status: int, message: str, *, retry_after: float = 0.0):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
