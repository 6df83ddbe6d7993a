"""How a convolution moves over its data.

X (batch, channels, *size) --kernel, strides, dilations, pads--> positions (.., channels / groups * prod(kernel))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class Window:
    """The geometry of a Conv or ConvTranspose; one number a spatial axis unless said otherwise.

    Attributes:
        kernel: Size of the kernel.
        strides: Steps.
        dilations: Distances of the kernel's points.
        pads: All begins, then all ends; or "SAME_UPPER", "SAME_LOWER" or (of a ConvTranspose) "output_shape" where
            they depend on the size of the data.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | str

    def pads_over(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the pads of a Conv over data of this spatial size: all begins, then all ends.

        Raises:
            ValueError: For a ConvTranspose with an output_shape.

        Examples:
            >>> Window(kernel=(3, 4), strides=(2, 1), dilations=(1, 1), pads="SAME_LOWER").pads_over((7, 7))
            (1, 2, 1, 1)
        """
        if not isinstance(self.pads, str):
            return self.pads
        if self.pads not in ("SAME_UPPER", "SAME_LOWER"):
            raise ValueError(f"expected the window of a Conv, but got pads by {self.pads}")
        totals = [
            max((-(-length // stride) - 1) * stride + (points - 1) * dilation + 1 - length, 0)
            for length, points, stride, dilation in zip(size, self.kernel, self.strides, self.dilations, strict=True)
        ]
        smaller, larger = tuple(n // 2 for n in totals), tuple(n - n // 2 for n in totals)
        return smaller + larger if self.pads == "SAME_UPPER" else larger + smaller


def window_of(node: ir.Node, kernel: Sequence[int]) -> Window:
    """Return the window of a Conv or ConvTranspose node with a kernel of this size."""
    attributes, ones = node.attributes, (1,) * len(kernel)
    auto_pad = attributes.get_string("auto_pad", "NOTSET")
    pads: tuple[int, ...] | str = tuple(attributes.get_ints("pads", (0, 0) * len(kernel)))
    if "output_shape" in attributes:
        pads = "output_shape"
    elif auto_pad == "VALID":
        pads = (0, 0) * len(kernel)
    elif auto_pad not in ("NOTSET", ""):
        pads = auto_pad
    return Window(
        kernel=tuple(kernel),
        strides=tuple(attributes.get_ints("strides", ones)),
        dilations=tuple(attributes.get_ints("dilations", ones)),
        pads=pads,
    )
