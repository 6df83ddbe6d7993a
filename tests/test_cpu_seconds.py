"""The list of slow files is measured, and `--fast` leaves out what it lists."""

from types import SimpleNamespace

from cpu_seconds import CpuSeconds, slow_files


def report(file, seconds):
    return SimpleNamespace(nodeid=f"tests/{file}::test_it", cpu_seconds=seconds)


def test_files_are_listed_by_their_cpu_seconds(tmp_path):
    for name in ("a.py", "b.py", "c.py", "before.py"):
        (tmp_path / name).touch()
    stored = tmp_path / "list.txt"
    stored.write_text("# head\n  9.0  before.py\n  8.0  c.py\n  7.0  gone.py\n")
    plugin = CpuSeconds(stored)
    for file, seconds in [("a.py", 2.0), ("a.py", 2.5), ("b.py", 1.0), ("c.py", 0.1)]:
        plugin.pytest_runtest_logreport(report(file, seconds))
    plugin.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace()))
    assert slow_files(stored) == {"before.py": 9.0, "a.py": 4.5}


def test_every_listed_file_exists():
    from cpu_seconds import STORED

    assert [path for path in slow_files() if not (STORED.parent / path).is_file()] == []
