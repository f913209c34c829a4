"""Keep the C library from giving memory back that the next step asks for again.

Each step of a convolution model frees tens of megabytes of activations; glibc returns large blocks to the
kernel at once and the next step faults every page in again. `settle_allocator` makes it keep them: once
in each process that trains, before the first tensor.
"""

from __future__ import annotations

import ctypes
import logging
import platform

log = logging.getLogger(__name__)

# <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4

_SETTINGS = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 256 << 20))


def settle_allocator() -> bool:
    """Let this process keep the memory that it frees.

    Returns:
        Whether the C library took the settings.
    """
    name, version = platform.libc_ver()
    if name != "glibc":
        log.info("allocator left as it is: the C library is %s, not glibc", name or "unknown")
        return False
    library = ctypes.CDLL(None)
    taken = all(library.mallopt(option, value) == 1 for option, value in _SETTINGS)
    if not taken:
        log.info("allocator left as it is: glibc %s refused a setting", version)
    return taken
