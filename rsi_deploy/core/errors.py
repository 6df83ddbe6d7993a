"""The ways a command can end badly, each with its exit code.

Exit codes: 2 usage, 3 the model cannot be handled, 4 a gate failed. Anything else that escapes is a defect of
ours and ends with 1. A message names the site or file, what came, what was expected, and what to type.
"""


class RsiDeployError(Exception):
    """Base of every error a user can meet; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(RsiDeployError):
    """The request itself is wrong: an option, a path, a name, data that does not fit."""

    exit_code = 2


class ModelError(RsiDeployError):
    """The model (or its weights) cannot be handled, with the reason."""

    exit_code = 3


class GateError(RsiDeployError):
    """A promise was broken: parity, accuracy, latency or integrity; the message says which one."""

    exit_code = 4
