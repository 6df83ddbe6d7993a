"""The exception that becomes an error object of the protocol."""


class Refusal(Exception):  # noqa: N818 - the request is wrong, not the server
    """A request that is answered with an error object.

    Args:
        status: HTTP status; the gRPC status is derived from it.
        message: what came and what was expected.
        retry_after: seconds after which the client may try again; 0 if that would not help.
    """

    def __init__(self, status: int, message: str, *, retry_after: float = 0.0):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
