"""What is freed goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

from fastdistil.compare.memory import return_freed_memory

_IN_PIECES = """
from fastdistil.compare.memory import return_freed_memory

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) << 10

kept = [bytearray(1 << 16) for _ in range(3200)]  # 200 MiB, in pieces that come from the heap
before = resident()
last = kept.pop()  # holds the heap's end, so that the C library gives nothing back by itself
del kept
freed = resident()
return_freed_memory()
print(before - freed, freed - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library without malloc_trim")
def test_what_the_c_library_keeps_is_given_back():
    done = subprocess.run([sys.executable, "-c", _IN_PIECES], capture_output=True, text=True, check=True)
    by_itself, returned = map(int, done.stdout.split())
    assert by_itself < 10 << 20
    assert returned > 180 << 20


def test_another_c_library_has_nothing_to_give(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    return_freed_memory()
