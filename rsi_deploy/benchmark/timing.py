"""The innermost timing loop, with only the call between two readings of the clock.

    t[i] = clock after call i - clock before it        ns

The list is allocated beforehand, so the loop allocates only the numbers themselves. Its overhead is one pair of clock
readings per call; `bench/overhead.py` measures it.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt


def time_calls(call: Callable[[], object], count: int) -> npt.NDArray[np.int64]:
    """Call a function `count` times in a row and return the nanoseconds of each call, int64 `(count,)`.

    Args:
        call: one inference, for example `binding.bind(...).call`; its result is ignored.
        count: number of calls, 0 or more.

    >>> time_calls(list, 3).shape
    (3,)
    """
    clock = time.perf_counter_ns
    times = [0] * count
    for index in range(count):
        start = clock()
        call()
        times[index] = clock() - start
    return np.asarray(times, np.int64)
