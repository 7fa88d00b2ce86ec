"""SPIN: image-guided head suppression (arXiv 2505.16411), without training and at no latency.

Each head is scored by how far it looks at the image; the heads that look least are turned down.
That makes a vision-language model lean less on what its language alone expects.
"""

from edgekit.models.spin import SpinConfig
from edgekit.spin.presets import preset, preset_names
from edgekit.spin.torch_form import Spin, apply

__all__ = ["Spin", "SpinConfig", "apply", "preset", "preset_names"]
