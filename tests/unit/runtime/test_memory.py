"""What batches took goes back to the operating system, whatever small objects lie between them."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has such heaps")

GROWN_MIB = """
import ctypes
from mlserver_hftasks.runtime.memory import keep_heaps_small
keep_heaps_small()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def touched(size):
    pointer = libc.malloc(size)
    libc.memset(pointer, 1, size)
    return pointer

libc.free(touched(8 * 2**20))  # from now on glibc itself would map nothing smaller
before = resident_mib()
large = []
for _ in range(100):
    large.append(touched(2**20))
    touched(100_000)  # stays, and keeps the heap from shrinking
for pointer in large:
    libc.free(pointer)
print(resident_mib() - before)
"""


def grown_mib(**environment: str) -> float:
    variables = {name: value for name, value in os.environ.items() if "MALLOC" not in name.upper()}
    done = subprocess.run(
        [sys.executable, "-c", GROWN_MIB], env=variables | environment, capture_output=True, check=True
    )
    return float(done.stdout)


def test_large_blocks_go_back_at_once() -> None:
    assert grown_mib() < 20


def test_the_environment_has_the_last_word() -> None:
    assert grown_mib(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=33554432") > 80
