"""Memory between the models of a comparison."""

import ctypes
import gc
from contextlib import suppress


def return_freed_memory() -> None:
    """Give back to the system what models that are gone took, where the C library can (glibc).

    Batches of many lengths leave its heap in pieces, which it keeps: a model of 12 layers that was trained
    and deleted leaves some 1.5 GB, and a comparison of many grows by part of it with each.
    """
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)
