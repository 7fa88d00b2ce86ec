"""Devices over SSH: a bundle measured where it will run.

Example:
    >>> from edgekit.remote import profile_remotely
    >>> report = profile_remotely("user@device", "out", ["--depth", "0,4096"])   # doctest: +SKIP
    >>> json.loads(report)[0]["decode"][1]["tokens_per_second"]["median"]        # doctest: +SKIP
    9.8
"""

from edgekit.remote.profiling import profile_remotely

__all__ = ["profile_remotely"]
