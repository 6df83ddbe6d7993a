"""Type aliases that several rooms share."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Shape = tuple[int, ...]
Interval = tuple[float, float]

Feeds = Mapping[str, Array]
"""Input name -> array, as a session takes them."""

Progress = Callable[[str, int, int], None]
"""Called with what begins, its index from 0, and the total number of pieces of work."""
