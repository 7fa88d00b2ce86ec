"""Rows of held-out texts, to measure on."""

from pathlib import Path

import torch

from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer
from edgekit.utf8 import read_text

__all__ = ["read_rows"]


def read_rows(path: Path, tokenizer: Tokenizer, *, length: int, tokens: int) -> torch.Tensor:
    """The beginning of a text as rows that follow one another.

    Args:
        path: UTF-8 text.
        tokenizer: of the model.
        length: tokens of a row.
        tokens: at most so many; what does not fill a row is left out.

    Returns:
        Ids, int64 `[N, length]`.

    Raises:
        UsageError: if the text cannot be read, or is shorter than a row.
    """
    ids = torch.from_numpy(tokenizer.encode(read_text(path), add_special_tokens=False))[:tokens]
    rows = len(ids) // length
    if not rows:
        raise UsageError(
            f"{path}: {len(ids)} tokens read; give at least the {length} of a row, or shorter rows"
        )
    return ids[: rows * length].view(rows, length)
