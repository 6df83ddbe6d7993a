"""The innermost loop: nothing between two readings of the clock but the call.

    t[i] = clock after call i - clock before it        ns

The list is made beforehand and only written to, so the loop allocates nothing but the numbers themselves. What it adds
to a call is one pair of clock readings; `bench/overhead.py` measures it against a bare loop.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt


def time_calls(call: Callable[[], object], count: int) -> npt.NDArray[np.int64]:
    """Call `count` times in a row: int64 `(count,)`, nanoseconds.

    Args:
        call: one inference, such as `binding.bound_call` gives; what it returns is dropped.
        count: 0 or more.

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
