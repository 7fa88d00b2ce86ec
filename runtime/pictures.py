"""What a decoder reads of pictures."""

from dataclasses import dataclass, field

import numpy as np

from edgekit.runtime.engine import Floats, Integers

__all__ = ["Pictures"]


def _no_grids() -> Integers:
    return np.zeros((0, 3), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures of one call, in the order of their image tokens; `Model.look` makes them.

    Attributes:
        features: one embedding for each image token, fp32 `[N, D]`.
        grids: time (1), height and width of each picture in patches, int64 `[pictures, 3]`, where
            positions have three axes; no decoder reads it where they have one.
    """

    features: Floats
    grids: Integers = field(default_factory=_no_grids)
