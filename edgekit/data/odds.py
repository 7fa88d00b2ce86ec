"""How the scenes of synthetic pictures are drawn, whatever they are made of."""

from dataclasses import dataclass

__all__ = ["Odds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Odds:
    """How scenes are drawn.

    Attributes:
        theme: probability of each object of the scene's theme.
        other: of each other object.
        undrawn: that an object is mentioned without being drawn.
    """

    theme: float
    other: float
    undrawn: float
