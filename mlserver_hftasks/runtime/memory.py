"""Memory of the process: what tensors took goes back to the operating system when they are gone."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from functools import cache
from typing import Any

MAPPED_BYTES = 256 * 1024
"""Larger blocks are mapped one by one. glibc would raise this to 32 MiB by itself, keep such blocks in its
heaps and, since no two batches are alike, cut these up: after minutes of mixed batches half of the heap was
holes, and it went on growing. Mapping costs no time that could be measured."""
M_MMAP_THRESHOLD = -3
"""`mallopt(3)`."""


@cache
def keep_heaps_small() -> None:
    """Map large blocks by themselves, from now on, unless the environment says what malloc shall do."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and "glibc.malloc" not in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        _call("mallopt", M_MMAP_THRESHOLD, MAPPED_BYTES)


def settle() -> None:
    """After a load: collect, and take what is there now out of later collections.

    Looking through all objects of torch and transformers would stop the event loop for half a second.
    """
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """After an unload: collect, and return what is free."""
    gc.unfreeze()
    settle()
    _call("malloc_trim", 0)


def _call(function: str, *arguments: Any) -> None:
    with suppress(OSError, AttributeError):  # only glibc has these
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
