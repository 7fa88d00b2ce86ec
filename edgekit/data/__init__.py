"""Text, conversations and needles: what models are trained on and measured with."""

from edgekit.data.batch import IGNORE, Batch
from edgekit.data.mixture import Mixture, NeedleShare, open_data

__all__ = ["IGNORE", "Batch", "Mixture", "NeedleShare", "open_data"]
