"""Keeps the memory of one batch for the next."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""See `mallopt(3)`."""
MMAP_BYTES = 32 * 2**20
"""The most that glibc takes on 64 bits."""
TRIM_BYTES = 2**30


def keep_freed_memory() -> None:
    """Have glibc reuse freed blocks instead of giving them back to the kernel at once.

    A model's intermediate results are megabytes each. Given back, each would be mapped and zeroed anew
    for the next batch: with int8 products a page fault for each of them took a third of the time. What is
    kept is bounded by the largest batch; `malloc_trim` at unload gives it back. Other C libraries are left
    as they are.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
