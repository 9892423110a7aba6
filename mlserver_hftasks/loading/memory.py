"""Memory of the process: a batch's is kept for the next, holes go back to the operating system.

The intermediate results of a batch are blocks of megabytes. Were each given back when it is freed, the
kernel would map and zero it anew for the next batch: with int8 products that took a third of the time.
Kept in glibc's heaps they cost nothing, but since no two batches are alike the heaps get holes: after
minutes of mixed batches half of a heap was free and it went on growing. So freed blocks are kept, and now
and then what lies free is given back; the next batch takes what it needs again.

All of it is glibc's; other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""See `mallopt(3)`."""
MMAP_BYTES = 32 * 2**20
"""The most that glibc takes on 64 bits."""
TRIM_BYTES = 2**30
TRIM_SECONDS = 10.0
"""Giving back takes some 30 ms, and the next batch some more."""
GROWTH = 1.02
"""Giving back waits until this is reached: an idle process is left alone."""


@cache
def manage() -> None:
    """Do what the module docstring says, from now on; unless the environment says what malloc shall do."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return
    _call("mallopt", M_MMAP_THRESHOLD, MMAP_BYTES)
    _call("mallopt", M_TRIM_THRESHOLD, TRIM_BYTES)
    threading.Thread(target=_watch, name="hftasks-memory", daemon=True).start()


@contextmanager
def without_collections() -> Iterator[None]:
    """While a model is loaded: what comes with it stays, and to look through it time and again takes a fifth
    of the time until the model is ready. Call `settle` at the end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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


def trim_if_grown(least: float) -> float:
    """Return what is free, if the process has grown from `least` resident bytes; the new least."""
    resident = resident_bytes()
    if resident > GROWTH * least:
        _call("malloc_trim", 0)
        return resident_bytes()
    return min(least, resident)


def resident_bytes() -> float:
    """Memory of this process that is in RAM; NaN where the system does not say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return math.nan


def _watch() -> None:
    least = 0.0
    while True:
        time.sleep(TRIM_SECONDS)
        least = trim_if_grown(least)


def _call(function: str, *arguments: Any) -> None:
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
