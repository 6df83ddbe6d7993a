import numpy as np

from rsi_deploy.benchmark import timing


def test_every_call_is_timed_by_itself(monkeypatch):
    """A clock of our own: a call takes 5 ns more than the one before, and reading the clock takes 1 ns."""
    now = [0]
    calls = []

    def clock():
        now[0] += 1
        return now[0]

    def call():
        calls.append(len(calls))
        now[0] += 5 * len(calls)

    monkeypatch.setattr(timing.time, "perf_counter_ns", clock)
    times = timing.time_calls(call, 4)
    assert times.tolist() == [6, 11, 16, 21]
    assert times.dtype == np.int64
    assert calls == [0, 1, 2, 3]


def test_no_calls_are_no_times():
    assert timing.time_calls(lambda: 1 / 0, 0).shape == (0,)
