"""A vision-language model on disk with chosen heads folded into its weights."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekit.sources import Source
from edgekit.sources.picture_model import open_picture_model
from edgekit.sources.quiet import quiet_transformers
from edgekit.spin.static import fold_static
from edgekit.staging import staged

__all__ = ["fold_into"]

WEIGHTS = (".safetensors", ".safetensors.index.json")


def fold_into(
    source: Source,
    heads: Mapping[int, Sequence[int]],
    alpha: float,
    out: Path,
    *,
    force: bool = False,
) -> Path:
    """Write a model whose chosen heads are turned down for every token, in fp32.

    Args:
        source: a vision-language model; its other files are copied.
        heads: by layer.
        alpha: 0 to 1.
        out: the directory to make.
        force: replace an existing model there.

    Returns:
        `out`.

    Raises:
        UsageError: for a source that reads no pictures, or layers, heads or a factor that do not
            exist.
        BundleError: if `out` exists or cannot be written.
    """
    with staged(out, force=force, kind="model") as work:
        model = open_picture_model(source).model
        fold_static(model, heads, alpha)
        with quiet_transformers():
            model.save_pretrained(work)
        for path in sorted(source.directory.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHTS):
                shutil.copyfile(path, os.fspath(work / path.name))
    return out
