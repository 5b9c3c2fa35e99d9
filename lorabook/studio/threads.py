"""One limit of GNU's OpenMP, worked around: two threads that compute make each other several times slower.

Each Python thread that runs torch on the CPU gets a pool of OpenMP threads of its own. Once the pools together have more
threads than there are cores, libgomp no longer waits actively, and every small operation pays for waking its helpers: see
GOMP_SPINCOUNT in https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""

import ctypes
from functools import lru_cache
from pathlib import Path

_HARD = 2  # omp_pause_hard: the pool is given back


def give_threads_back() -> None:
    """Let the calling thread's OpenMP pool go, so that another thread has all cores; the next operation makes it anew."""
    if (library := _openmp()) is not None:
        library.omp_pause_resource_all(_HARD)


@lru_cache
def _openmp():
    """The GNU OpenMP that torch has loaded, or None: on other systems, and where the file of the maps is not readable."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        found = next((line.split()[-1] for line in lines if "libgomp" in line), None)
        library = ctypes.CDLL(found) if found else None
        return library if hasattr(library, "omp_pause_resource_all") else None
    except OSError:
        return None
