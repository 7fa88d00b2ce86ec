"""Which layers of a student are worth their softmax attention back (arXiv 2512.20569).

A layer is given the teacher's attention, with the teacher's projections, and the KL of the hybrid
to the teacher is measured on held-out rows: the layer whose return lowers it most is worth most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from edgekit.distill.estimate import Estimate, estimate
from edgekit.distill.teaching import Autocast
from edgekit.errors import UsageError
from edgekit.kernels.precision import widened
from edgekit.mixers.base import MixerContext
from edgekit.models.decoder import Decoder, step_context

__all__ = ["Choice", "Restored", "pick_layers"]

Progress = Callable[[str, int, int], None]
BLOCK_TOKENS = 2048  # whose hidden states before every layer are kept at a time
LOGIT_ROWS = 256  # of logits at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """A layer that is given its softmax attention back.

    Attributes:
        layer: its index.
        kl: of the hybrid with it: mean KL(teacher || hybrid) per token, nats.
        gain: by how much that is lower than without it, row by row.
    """

    layer: int
    kl: float
    gain: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Layers that are worth keeping as softmax.

    Attributes:
        kl: of the student as it is.
        ranking: every converted layer alone, the best first.
        steps: the layers that are kept, in the order in which they were chosen, each measured
            beside those before it.
        softmax_layers: of the next student, rising: those kept, and those that it had.
        greedy: whether each was chosen given those before it, or by the ranking.
        rows: that were measured.
        length: tokens of a row.
    """

    kl: float
    ranking: tuple[Restored, ...]
    steps: tuple[Restored, ...]
    softmax_layers: tuple[int, ...]
    greedy: bool
    rows: int
    length: int


def pick_layers(
    teacher: Decoder,
    student: Decoder,
    ids: torch.Tensor,
    autocast: Autocast,
    *,
    keep: int,
    greedy: bool = False,
    progress: Progress | None = None,
) -> Choice:
    """Choose the layers of a student that should keep softmax attention.

    Args:
        teacher: of the student.
        student: after stage 1 or 2; the layers that are softmax already stay it.
        ids: held-out rows, int64 `[N, T]`, each read from an empty state.
        autocast: enters the precision of matrix products.
        keep: how many layers to choose.
        greedy: choose each given those before it, which takes `keep` times as long; otherwise the
            `keep` best alone.
        progress: called with a name, the number of a hybrid and the count of hybrids.

    Raises:
        UsageError: if `keep` is less than 1 or more than the layers that are not softmax.
    """
    mixers = student.config.mixers
    left = [i for i, mixer in enumerate(mixers) if mixer != "softmax"]
    if not 1 <= keep <= len(left):
        raise UsageError(f"keep {keep} given; allowed: 1 to {len(left)}, the layers to choose from")
    hybrids = _Hybrids(teacher, student, ids, autocast, progress)
    hybrids.expected = sum(1 + len(left) - i for i in range(keep)) if greedy else len(left) + keep
    before, alone = hybrids.measure((), left)
    ranking = _ranked(before, alone)
    if greedy:
        steps = _one_after_another(hybrids, left, before, alone, keep)
    else:
        steps = _as_ranked(hybrids, ranking[:keep], before, alone)
    kept = [i for i, mixer in enumerate(mixers) if mixer == "softmax"]
    return Choice(
        kl=before.mean().item(),
        ranking=tuple(ranking),
        steps=tuple(steps),
        softmax_layers=tuple(sorted([*kept, *(step.layer for step in steps)])),
        greedy=greedy,
        rows=len(ids),
        length=ids.shape[1],
    )


def _ranked(before: torch.Tensor, found: Mapping[int, torch.Tensor]) -> list[Restored]:
    """The layers of `found`, whose KL per row was `before`, the best first."""
    restored = [_restored(layer, before, after) for layer, after in found.items()]
    return sorted(restored, key=lambda r: r.kl)


def _restored(layer: int, before: torch.Tensor, after: torch.Tensor) -> Restored:
    return Restored(layer=layer, kl=after.mean().item(), gain=estimate(before - after))


def _one_after_another(
    hybrids: "_Hybrids",
    left: Sequence[int],
    before: torch.Tensor,
    alone: Mapping[int, torch.Tensor],
    keep: int,
) -> list[Restored]:
    """The best layer given those before it, `keep` times."""
    steps = [_ranked(before, alone)[0]]
    while len(steps) < keep:
        chosen = [step.layer for step in steps]
        found = hybrids.measure(chosen, [i for i in left if i not in chosen])
        steps.append(_ranked(*found)[0])
    return steps


def _as_ranked(
    hybrids: "_Hybrids",
    ranking: Sequence[Restored],
    before: torch.Tensor,
    alone: Mapping[int, torch.Tensor],
) -> list[Restored]:
    """The layers of `ranking`, each measured beside those before it."""
    chosen = [ranking[0].layer]
    steps, before = [_restored(chosen[0], before, alone[chosen[0]])], alone[chosen[0]]
    for restored in ranking[1:]:
        chosen.append(restored.layer)
        after, _ = hybrids.measure(chosen, ())
        steps.append(_restored(restored.layer, before, after))
        before = after
    return steps


class _Hybrids:
    """Students with some layers given back, measured block by block of rows.

    Attributes:
        expected: hybrids that will be measured, for the progress.
    """

    def __init__(
        self,
        teacher: Decoder,
        student: Decoder,
        ids: torch.Tensor,
        autocast: Autocast,
        progress: Progress | None,
    ) -> None:
        """The arguments are those of `pick_layers`."""
        self._teacher, self._student, self._autocast = teacher, student, autocast
        self._blocks = torch.split(ids, max(BLOCK_TOKENS // ids.shape[1], 1))
        self._progress, self._done = progress, 0
        self.expected = 0

    @torch.no_grad()
    def measure(
        self, chosen: Sequence[int], candidates: Sequence[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """KL with the layers `chosen` given back, and with each candidate beside them, `[N]`."""
        blocks = [self._block(ids, chosen, candidates) for ids in self._blocks]
        first, *others = torch.cat(blocks, dim=1)
        return first, dict(zip(candidates, others, strict=True))

    def _block(
        self, ids: torch.Tensor, chosen: Sequence[int], candidates: Sequence[int]
    ) -> torch.Tensor:
        """KL of some rows, `[1 + candidates, n]`; what comes before a candidate runs once."""
        time, layers = ids.shape[1], range(self._student.config.num_layers)
        context = step_context(self._student.config, time, time, None, "chunked", ids.device)
        with self._autocast():
            expected, _ = self._teacher.hidden(ids)
            entering = [self._student.model.embed_tokens(ids)]
            for i in layers:
                entering.append(self._through(i, entering[i], context, i in chosen))
            found = [self._divergence(entering[-1], expected)]
            for candidate in candidates:
                x = self._through(candidate, entering[candidate], context, True)
                for i in layers[candidate + 1 :]:
                    x = self._through(i, x, context, i in chosen)
                found.append(self._divergence(x, expected))
        return torch.stack(found)

    def _through(
        self, layer: int, x: torch.Tensor, context: MixerContext, restored: bool
    ) -> torch.Tensor:
        """The student's layer, with the teacher's attention if it is given back."""
        own = self._student.layers[layer]
        attention = self._teacher.layers[layer].self_attn if restored else own.self_attn
        mixed, _ = attention(own.input_layernorm(x), context)
        return own.after_mixer(x, mixed)

    def _divergence(self, x: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """KL(teacher || hybrid), mean over each row, fp32 `[n]`."""
        if self._progress is not None:
            self._progress("layers given back", self._done, self.expected * len(self._blocks))
        self._done += 1
        hidden = self._student.model.norm(x).flatten(0, 1)
        pieces = []
        halves = (torch.split(y, LOGIT_ROWS) for y in (hidden, expected.flatten(0, 1)))
        for got, wanted in zip(*halves, strict=True):
            log_p = widened(self._student.lm_head(got)).log_softmax(dim=-1)
            log_q = widened(self._teacher.lm_head(wanted)).log_softmax(dim=-1)
            pieces.append((log_q.exp() * (log_q - log_p)).sum(dim=-1))
        return torch.cat(pieces).view(x.shape[:2]).mean(dim=1)
