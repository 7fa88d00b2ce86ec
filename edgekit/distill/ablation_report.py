"""An ablation's figures, and the table that they make."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.distill.estimate import Estimate
from edgekit.distill.variants import BASE
from edgekit.markdown import markdown_table

__all__ = ["Ablation", "Scored", "as_markdown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One variant after its training.

    Attributes:
        name: of the variant.
        changes: dotted keys in which it differs from the base, with the base's value and its own.
        error: normalised error of its heads on held-out rows, teacher-forced, mean over the layers;
            0 is the teacher.
        against_base: how much larger than the base's that is, row by row; None for the base.
        layers: the error of each layer.
        perplexity: of the student, by text; empty where not every layer was converted.
        state_bytes: that its layers carry per sequence, fp32.
        parameters: that its mixers add to the teacher.
        seconds: of its own forward and backward passes.
        stopped_at: tokens after which its loss was not finite; None if it learned to the end.
    """

    name: str
    changes: dict[str, tuple[Any, Any]]
    error: Estimate
    against_base: Estimate | None
    layers: tuple[float, ...]
    perplexity: dict[str, float]
    state_bytes: int
    parameters: int
    seconds: float
    stopped_at: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """Variants at equal tokens, the best first.

    Attributes:
        description: of the question.
        teacher: its name.
        layers: that were learned.
        of_layers: that the teacher has.
        tokens: that every variant learned from, the same rows in the same order.
        length: tokens of a row.
        batch: rows of a step.
        seed: of the order of rows.
        device: in words.
        seconds: of the whole training, the teacher's passes among them.
        data: name, sha256 and tokens of each training file.
        held_out: rows of `length` tokens measured on, by text.
        teacher_perplexity: by text; empty where the students' is.
        teacher_bytes: that the same layers of the teacher add to their cache with every token,
            fp32.
        scored: the variants.
    """

    description: str
    teacher: str
    layers: tuple[int, ...]
    of_layers: int
    tokens: int
    length: int
    batch: int
    seed: int
    device: str
    seconds: float
    data: tuple[dict[str, Any], ...]
    held_out: dict[str, int]
    teacher_perplexity: dict[str, float]
    teacher_bytes: int
    scored: tuple[Scored, ...]


def as_markdown(result: Ablation, command: str) -> str:
    """The table, what it rests on, and the command that made it."""
    texts = tuple(result.teacher_perplexity)
    headers = ["variant", "change", "error", "against base"]
    headers += [f"perplexity, {text}" for text in texts]
    headers += ["state", "new parameters", "seconds"]
    rows = [_row(scored, texts) for scored in result.scored] + [_teacher(result, texts)]
    parts = (
        f"# {result.description}",
        markdown_table(rows, headers),
        "\n".join(f"- {note}" for note in _notes(result)),
        f"Made by:\n\n    {command}",
    )
    return "\n\n".join(parts) + "\n"


def _row(scored: Scored, texts: Sequence[str]) -> list[str]:
    changed = (f"{key} {_told(old)} → {_told(new)}" for key, (old, new) in scored.changes.items())
    against = "" if scored.against_base is None else f"{scored.against_base:+.4f}"
    stopped = "" if scored.stopped_at is None else f" (stopped at {scored.stopped_at:,} tokens)"
    return [
        f"**{scored.name}**" if scored.name == BASE else scored.name,
        ", ".join(changed),
        f"{scored.error:.4f}{stopped}",
        against,
        *(f"{scored.perplexity[text]:.2f}" for text in texts),
        f"{scored.state_bytes / 1e6:.2f} MB",
        f"{scored.parameters:,}",
        f"{scored.seconds:.0f}",
    ]


def _told(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "default" if value is None else str(value)


def _teacher(result: Ablation, texts: Sequence[str]) -> list[str]:
    found = [f"{result.teacher_perplexity[text]:.2f}" for text in texts]
    state = f"{result.teacher_bytes / 1e3:.1f} kB per token"
    return [f"teacher ({result.teacher})", "", "0", "", *found, state, "", ""]


def _notes(result: Ablation) -> Iterator[str]:
    rows = sum(result.held_out.values())
    told = ", ".join(f"{text} {count}" for text, count in result.held_out.items())
    yield (
        f"error: squared error of the heads over the variance of the teacher's, each layer reading "
        f"the teacher's own input, mean over the layers, on {rows} held-out rows of "
        f"{result.length} tokens ({told}); ± is half of the 95 % interval over these rows, and "
        "against base it is of the difference row by row"
    )
    yield (
        f"every variant learned stage 1 alone, from the same {result.tokens:,} tokens in the same "
        f"order: rows of {result.length}, {result.batch} a step; one seed ({result.seed}), so the "
        "intervals know nothing of what another seed would give"
    )
    if len(result.layers) < result.of_layers:
        layers = ", ".join(map(str, result.layers))
        yield (
            f"layers {layers} of {result.of_layers} only (counted from 0), so there is no "
            "perplexity; state and parameters are those of these layers"
        )
    else:
        yield "perplexity: of the student after stage 1, each row from an empty state, no tuning"
    yield (
        f"state in fp32; seconds: forward and backward passes of the variant's own mixers on "
        f"{result.device}, of {result.seconds:.0f} for everything; the teacher's passes are shared"
    )
