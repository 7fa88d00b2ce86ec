"""SPIN: image-guided head suppression (arXiv 2505.16411), without training and at no latency.

Each head is scored by how far it looks at the image; the heads that look least are turned down.
That makes a vision-language model lean less on what its language alone expects.
"""

from typing import TYPE_CHECKING, Any

from edgekit.models.spin import SpinConfig
from edgekit.spin.presets import preset, preset_names

if TYPE_CHECKING:
    from edgekit.spin.torch_form import Spin, apply

__all__ = ["Spin", "SpinConfig", "apply", "preset", "preset_names"]


def __getattr__(name: str) -> Any:
    """Resolve `Spin` and `apply` on first use: transformers' models take seconds to import."""
    if name in ("Spin", "apply"):
        from edgekit.spin import torch_form

        return getattr(torch_form, name)
    raise AttributeError(f"module 'edgekit.spin' has no attribute {name!r}")
