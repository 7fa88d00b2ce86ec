"""How many threads to use where an engine does not choose well by itself."""

import os

__all__ = ["usable_threads"]


def usable_threads(threads: int | None) -> int:
    """`threads`; None: as many as there are CPUs that this process may run on."""
    if threads is not None:
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
