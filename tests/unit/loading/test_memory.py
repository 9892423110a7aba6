"""What batches took is kept for the next ones; holes go back to the operating system."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has such heaps")

GROWN_MIB = """
import ctypes
from mlserver_hftasks.loading import memory
memory.manage()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def touched(size):
    pointer = libc.malloc(size)
    libc.memset(pointer, 1, size)
    return pointer

before = memory.resident_bytes()
large = []
for _ in range(100):
    large.append(touched(2**20))
    touched(100_000)  # stays, and keeps the heap from shrinking
for pointer in large:
    libc.free(pointer)
print((memory.resident_bytes() - before) / 2**20)
least = memory.trim_if_grown(before)
print((memory.resident_bytes() - before) / 2**20)
assert abs(memory.trim_if_grown(least) - least) < 2**20
"""


def grown_mib(**environment: str) -> list[float]:
    """Growth after 100 blocks of 1 MiB were freed, and after `trim_if_grown`."""
    variables = {name: value for name, value in os.environ.items() if "MALLOC" not in name.upper()}
    done = subprocess.run(
        [sys.executable, "-c", GROWN_MIB], env=variables | environment, capture_output=True, check=True
    )
    return [float(line) for line in done.stdout.split()]


def test_freed_blocks_are_kept_until_the_process_has_grown() -> None:
    kept, given_back = grown_mib()
    assert kept > 90
    assert given_back < 20  # what stays is 10


def test_the_environment_has_the_last_word() -> None:
    kept, _ = grown_mib(MALLOC_MMAP_THRESHOLD_="131072")
    assert kept < 20
