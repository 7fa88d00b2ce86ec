"""Where a teacher comes from: a Hugging Face directory or Hub id, a GGUF file, or built in."""

from edgekit.sources.base import Source
from edgekit.sources.checks import check_weights
from edgekit.sources.resolve import open_source

__all__ = ["Source", "check_weights", "open_source"]
