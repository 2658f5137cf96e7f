"""How many taps of a convolution meet its input: padding, and the zeros that a dilated input is spread with, do not."""

import functools

import numpy as np


@functools.lru_cache(maxsize=4096)
def count_taps(
    size: int, outputs: int, kernel: int, stride: int = 1, low: int = 0, dilation: int = 1, kernel_dilation: int = 1
) -> int:
    """Pairs (output, tap of the kernel) along one axis that fall on one of `size` input values.

    Args:
      size, outputs, kernel: values of the input, outputs, taps.
      stride: of the outputs. low: padding before the first value, negative where it is cut.
      dilation: of the input; kernel_dilation: of the kernel.
    """
    # Output o and tap k read place o · stride + offset of the dilated input, which holds a value every `dilation` places.
    offset = np.arange(kernel, dtype=np.int64) * kernel_dilation - low
    first = np.maximum(-(offset // stride), 0)  # ceil(-offset / stride)
    last = np.minimum(((size - 1) * dilation - offset) // stride, outputs - 1)
    step = np.gcd(stride, dilation)
    period = dilation // step  # of the outputs that meet a value
    if period == 1:
        meets, start = offset % step == 0, first
    else:
        meets = offset % step == 0
        phase = (-(offset // step) * pow(int(stride // step), -1, int(period))) % period
        start = first + (phase - first) % period
    counts = np.maximum((last - start) // period + 1, 0)
    return int(counts[meets].sum())
