"""What an ablation measures of its students: errors of every layer, perplexity, state, size."""

from collections.abc import Callable, Mapping, Sequence

import torch

from edgekit.distill.heldout import perplexity
from edgekit.distill.stage import TorchBatch
from edgekit.distill.teaching import Autocast, View, show_layers, squared_error
from edgekit.models.decoder import Decoder

__all__ = ["layer_errors", "perplexities", "state_bytes"]

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def layer_errors(
    teacher: Decoder,
    students: Mapping[str, Decoder],
    rows: torch.Tensor,
    autocast: Autocast,
    *,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Normalised error of each student's heads, teacher-forced.

    Args:
        teacher: shows each layer's input and heads.
        students: of the same layers, by name.
        rows: ids `[N, T]`, one row at a time.
        autocast: enters the precision of matrix products.
        progress: called with a name, the number of the row and the count of rows.

    Returns:
        fp64 `[N, layers]` for each student: the squared error of a row's heads over the variance of
        the teacher's heads in that layer on all rows. 0 is the teacher itself.
    """
    mixers = next(iter(students.values())).config.mixers
    layers = [i for i, mixer in enumerate(mixers) if mixer != "softmax"]
    found = {n: torch.zeros(len(rows), len(layers), dtype=torch.float64) for n in students}
    moments = torch.zeros(2, len(layers), dtype=torch.float64)
    for number, row in enumerate(rows):
        if progress is not None:
            progress("errors on held-out rows", number, len(rows))

        def visit(view: View, number: int = number) -> None:
            column, heads = layers.index(view.layer), view.heads.double()
            moments[:, column] += torch.stack((heads.mean(), heads.square().mean())).cpu()
            for name, student in students.items():
                error = squared_error(student, view, autocast).item() / heads.numel()
                found[name][number, column] = error

        batch = TorchBatch(row[None], row[None], None)
        show_layers(teacher, layers, batch, autocast, visit)
    mean, square = moments / len(rows)
    return {name: errors / (square - mean.square()) for name, errors in found.items()}


def perplexities(
    models: Mapping[str, Decoder],
    texts: Mapping[str, torch.Tensor],
    autocast: Autocast,
    *,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Perplexity of every model on every text (rows of ids `[N, T]`), each row on its own."""
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    pairs = [(model, text) for model in models for text in texts]
    for number, (model, text) in enumerate(pairs):
        if progress is not None:
            progress(f"perplexity of {model} on {text}", number, len(pairs))
        rows = texts[text]
        found[model][text] = perplexity(
            models[model], rows.flatten(), autocast, window=rows.shape[1]
        )
    return found


@torch.no_grad()
def state_bytes(decoder: Decoder, layers: Sequence[int], autocast: Autocast) -> int:
    """Bytes that `layers` carry from token to token, for one sequence, after its first token.

    Floats are counted as fp32, which is how devices keep them, whatever the precision here.
    """
    token = torch.zeros(1, 1, dtype=torch.int64, device=decoder.lm_head.weight.device)
    with autocast():
        _, states = decoder.hidden(token)
    return sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        for layer in layers
        for name, tensor in states[layer].items()
        if name != "position"
    )
