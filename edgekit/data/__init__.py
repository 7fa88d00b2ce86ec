"""Text, conversations and needles: what models are trained on and measured with."""

from edgekit.data.batch import IGNORE, Batch
from edgekit.data.mixture import Corpus, DataFile, Mixture, NeedleShare, read_corpus

__all__ = ["IGNORE", "Batch", "Corpus", "DataFile", "Mixture", "NeedleShare", "read_corpus"]
