"""The command line: verbs, options, streams and exit codes. All work is done by the functions of the same names.

Results go to stdout (one JSON document with --json), progress and logs to stderr. Exit codes: 0 done, 2 usage,
3 the model cannot be handled (or the disk does not hold it), 4 a gate failed, 130 interrupted (143 by SIGTERM, 129 by
SIGHUP), 1 what nobody foresaw.
"""

import errno
import logging
import os
import shlex
import sys
import warnings

import click

from rsi_deploy import __version__
from rsi_deploy.cli.bench import bench
from rsi_deploy.cli.doctor import doctor, schema
from rsi_deploy.cli.evaluate import evaluate_verb
from rsi_deploy.cli.export import export
from rsi_deploy.cli.inspect import inspect
from rsi_deploy.cli.package import package
from rsi_deploy.cli.profile import profile
from rsi_deploy.cli.serve import serve
from rsi_deploy.cli.signals import EndedError, ending_signals
from rsi_deploy.cli.sweep import sweep
from rsi_deploy.cli.verify import verify
from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.core.text import on_terminal

FULL_DISK = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file has come to the largest size that this process may write (ulimit -f)",
}
WHOLE = "nothing partial was left under the final name"
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}


def yield_idle_threads() -> None:
    """Let idle OpenMP threads of torch sleep instead of spin, unless the user chose; call it before torch loads.

    Where another process wants the cores, spinning threads make small matrix work ten times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str] | None = None) -> None:
    """Entry point: run a verb and end the process with its exit code."""
    sys.exit(run(argv))


def run(argv: list[str] | None = None) -> int:
    """Run a verb and return its exit code; every foreseen error is one message on stderr."""
    yield_idle_threads()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # our own message says what is wrong with a picture
    try:
        typed = shlex.join(["rsi-deploy", *(sys.argv[1:] if argv is None else argv)])  # for the record
        with ending_signals():
            return cli.main(args=argv, prog_name="rsi-deploy", standalone_mode=False, obj=typed) or 0
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt) as error:
        return _fail(f"interrupted; {_left_by(error.__cause__ or error)}", 130)
    except EndedError as error:
        return _fail(f"ended by {error}; {_left_by(error)}", error.exit_code)
    except RsiDeployError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno in FULL_DISK:
            words = f"{FULL_DISK[error.errno]} ({error.filename or 'while writing'}); {WHOLE}"
            return _fail(_noted(words, error), 3)
        if error.errno in NO_ACCESS:
            return _fail(f"no permission: {error.filename or error}", 3)
        raise


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rsi-deploy")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr.")
def cli(verbose: bool) -> None:
    """Compress a trained network into a smaller, measurably faster ONNX model, and tell the truth about it."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr, format="%(message)s")
    for handler in logging.root.handlers:
        handler.setFormatter(_Guarded("%(message)s"))


class _Guarded(logging.Formatter):
    """Messages with names from files in them, whose control codes are shown and not obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        return on_terminal(super().format(record))


for verb in (export, sweep, profile, inspect, bench, evaluate_verb, package, verify, serve, doctor, schema):
    cli.add_command(verb)


def _left_by(error: BaseException) -> str:
    """What a command that was ended has left, as noted of the error on its way."""
    return "; ".join(getattr(error, "__notes__", [])) or WHOLE


def _noted(words: str, error: BaseException) -> str:
    """The words, and what was noted of the error on its way."""
    return "; ".join([words, *getattr(error, "__notes__", [])])


def _fail(message: str, code: int) -> int:
    click.echo(f"rsi-deploy: {on_terminal(message)}", err=True)
    return code
