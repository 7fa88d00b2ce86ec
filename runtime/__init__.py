"""Run a bundle on a device: numpy and one engine, nothing else.

Example:
    >>> from edgekit.runtime import load                             # doctest: +SKIP
    >>> model = load("smollm2")                                      # doctest: +SKIP
    >>> model.generate("The capital of France is", max_new_tokens=3)     # doctest: +SKIP
"""

from edgekit.runtime.generation import GenerationStats
from edgekit.runtime.model import Model, load
from edgekit.runtime.sampling import GenerationOptions
from edgekit.runtime.session import Session
from edgekit.runtime.state import Snapshot

__all__ = ["GenerationOptions", "GenerationStats", "Model", "Session", "Snapshot", "load"]
