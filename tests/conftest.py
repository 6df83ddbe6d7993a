import pytest


def pytest_collection_modifyitems(config, items):
    """Slow tests run only where they are asked for: `-m slow`."""
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
