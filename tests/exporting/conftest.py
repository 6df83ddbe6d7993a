"""Fixtures of the tests of exports."""

import pytest

from rsi_deploy.cli import run


@pytest.fixture
def ran(capsys):
    """Run a command line that must succeed, and return its output."""

    def command(*args):
        assert run([str(arg) for arg in args]) == 0, capsys.readouterr()
        return capsys.readouterr().out

    return command
