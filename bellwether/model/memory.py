"""Memory that is used again and again."""

from __future__ import annotations

import ctypes
import platform

# What glibc's malloc.h calls M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and the largest values that these take.
_TRIM, _MAP = -1, -3
_MOST_TRIM, _MOST_MAP = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> bool:
    """Tell the C library to keep memory that is freed, instead of giving it back to the system at once.

    A training step frees what the next one asks for again. Given back, each page of it must be found and cleared by
    the system anew, which on virtual machines may take longer than the computing in it.

    Returns:
        Whether it was told: on Linux with glibc. Elsewhere the system's own ways are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MAP, _MOST_MAP)) and bool(libc.mallopt(_TRIM, _MOST_TRIM))
