"""The errors that a command can end with, each with its exit code.

Exit codes: 2 usage, 3 the model cannot be handled, 4 a check failed. Any other exception is a bug and ends with 1. A
message names the site or file, what came, what was expected, and what to type.
"""


class RsiDeployError(Exception):
    """Base class of the errors that a user can meet.

    Attributes:
        exit_code: exit code of the command line.
        hint: what to type; it ends the message. "" if the message only says what was expected.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        text = f"{message}; {hint}" if hint else message
        super().__init__(text)
        self.hint = hint


class UsageError(RsiDeployError):
    """The request is wrong: an option, a path, a name, or data that do not fit."""

    exit_code = 2


class ModelError(RsiDeployError):
    """The model or its weights cannot be handled; the message says why."""

    exit_code = 3


class GateError(RsiDeployError):
    """A check failed: parity, accuracy, latency or integrity; the message says which."""

    exit_code = 4
