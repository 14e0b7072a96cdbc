"""Sizes that launches are made of, in plain Python.

Triton's own functions of these names serve kernels too, and take microseconds a call for it.
"""

from __future__ import annotations


def cdiv(size: int, part: int) -> int:
    """How many parts hold ``size``.

    Example:
        >>> cdiv(7, 3)
        3
    """
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """The least power of two that is at least ``size``, which is positive.

    Example:
        >>> next_power_of_2(5)
        8
    """
    return 1 << (size - 1).bit_length()
