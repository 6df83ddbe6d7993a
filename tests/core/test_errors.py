"""An error's message ends with its hint, which is a field of its own and survives a process boundary."""

import pickle

import pytest

from rsi_deploy.core.errors import GateError, ModelError, UsageError


@pytest.mark.parametrize("kind", [UsageError, ModelError, GateError])
def test_the_hint_is_a_field_and_the_end_of_the_message(kind):
    error = kind("out is not empty", hint="add --force to replace it")
    assert str(error) == "out is not empty; add --force to replace it"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.hint) == (kind, str(error), error.hint)
    assert kind("nothing to add").hint == ""
