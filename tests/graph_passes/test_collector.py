"""The collector is off inside, and afterwards as it was, whatever happens."""

import gc

import pytest

from graph_passes.collector import paused_collector


@pytest.mark.parametrize("on", [True, False])
def test_it_is_left_as_it_was(on):
    (gc.enable if on else gc.disable)()
    try:
        with pytest.raises(KeyError), paused_collector():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == on
    finally:
        gc.enable()
