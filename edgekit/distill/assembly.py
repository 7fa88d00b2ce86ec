"""What a distillation works on: teacher, student, rows, and the fingerprint of them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from edgekit.config import dump
from edgekit.data import DataFile, Mixture, NeedleShare, read_corpus
from edgekit.distill import recipe
from edgekit.distill.build import student_config, student_over
from edgekit.distill.heldout import perplexity
from edgekit.distill.processes import Processes
from edgekit.distill.sharding import place_unsharded, shard_frozen
from edgekit.distill.transfer import new_parameters
from edgekit.distill.tuning import pairs
from edgekit.errors import UsageError
from edgekit.models.decoder import Decoder
from edgekit.models.precision import Precision, narrow_frozen
from edgekit.runtime.text import Tokenizer
from edgekit.sources import Source, open_source
from edgekit.sources.student import Student, lowrank_tensors, read_student
from edgekit.utf8 import read_text

__all__ = ["Assembly", "Settings"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to run a recipe: nothing here changes what is learned, but for rounding.

    Attributes:
        precision: of matrix products; `auto` takes bf16 where the hardware has it.
        cpu: use the CPU where there is a GPU too.
        shard: spread the frozen matrices over the processes (FSDP).
        held_out: text that the student is measured on as it learns.
        held_out_tokens: of that text, from its beginning.
        evaluate_tokens: trained tokens between two measurements; None: at a stage's end only.
        checkpoint_seconds: between checkpoints.
        stop_after: seconds after which a checkpoint is written and the run ends, to be resumed.
        finish: train no further: write the student that an unfinished run has so far.
        dtype: of the student's file.
    """

    precision: Precision | Literal["auto"] = "auto"
    cpu: bool = False
    shard: bool = False
    held_out: Path | None = None
    held_out_tokens: int = 8192
    evaluate_tokens: int | None = None
    checkpoint_seconds: float = 120.0
    stop_after: float | None = None
    finish: bool = False
    dtype: Literal["float16", "float32"] = "float16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """What a distillation reads and changes.

    Attributes:
        source: the teacher, as a source.
        plan: the recipe.
        teacher: frozen, on the device.
        student: shares the teacher's tensors.
        init: the earlier student it starts from, if any.
        tokenizer: the teacher's.
        mixtures: rows of each stage that has steps.
        fingerprint: what must not change between a run and its continuation.
        processes: that share the work.
    """

    source: Source
    plan: recipe.Recipe
    teacher: Decoder
    student: Decoder
    init: Student | None
    tokenizer: Tokenizer
    mixtures: dict[int, Mixture]
    fingerprint: dict[str, Any]
    processes: Processes

    @classmethod
    def open(
        cls,
        source: str | Path,
        plan: recipe.Recipe,
        data: Sequence[str | Path],
        haystack: Path | None,
        init: str | Path | None,
        processes: Processes,
        progress: Progress | None,
    ) -> "Assembly":
        """Open everything; the arguments are those of `run.distill`.

        Raises:
            UsageError: for settings, data or an earlier student that do not fit.
            SourceError: if the teacher or the earlier student cannot be read.
        """
        opened = open_source(source)
        config = student_config(opened.config, plan)
        earlier = None if init is None else _earlier(init, opened, config.mixers, plan)
        tokenizer = Tokenizer(opened.directory)
        mixtures = _mixtures(opened, plan, data, haystack, tokenizer, progress)
        teacher = Decoder.from_store(opened.config, opened.weights)
        teacher.requires_grad_(False)
        if processes.precision == "bf16":
            narrow_frozen(teacher)
        if processes.shards:
            place_unsharded(teacher, processes.device)
        else:
            teacher.to(processes.device)
        trained = None
        if earlier is not None:
            trained = {name: earlier.tensors.tensor(name) for name in earlier.tensors}
        fingerprint = {
            "recipe": dump(plan),
            "teacher": opened.identity["sha256"],
            "data": _identity(next(iter(mixtures.values())).files),
            "init": None if earlier is None else dump(earlier.manifest.files),
            "precision": processes.precision,
        }
        student = student_over(teacher, config, trained)
        if processes.shards:
            shard_frozen(teacher, student, processes.device, processes.count)
        return cls(
            source=opened,
            plan=plan,
            teacher=teacher,
            student=student,
            init=earlier,
            tokenizer=tokenizer,
            mixtures=mixtures,
            fingerprint=fingerprint,
            processes=processes,
        )

    def held_out(self, choice: Settings) -> Callable[[Decoder], float] | None:
        """Perplexity of teacher or student on the held-out text; None where there is none.

        Raises:
            UsageError: if that text cannot be read or is too short.
        """
        if choice.held_out is None:
            return None
        text = read_text(choice.held_out)
        ids = self.tokenizer.encode(text, add_special_tokens=False)[: choice.held_out_tokens]
        window = min(512, len(ids))
        if window < 2:
            raise UsageError(f"{choice.held_out}: {len(ids)} tokens; give at least 2")
        tokens = torch.from_numpy(ids).to(self.processes.device)
        autocast = self.processes.autocast
        return lambda decoder: perplexity(decoder, tokens, autocast, window=window)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the student's file holds."""
        found: dict[str, torch.Tensor] = {}
        for layer, mixer in enumerate(self.student.config.mixers):
            if mixer != "softmax":
                found |= new_parameters(self.student, layer)
        return found | lowrank_tensors(pairs(self.student))


def _mixtures(
    source: Source,
    plan: recipe.Recipe,
    data: Sequence[str | Path],
    haystack: Path | None,
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> dict[int, Mixture]:
    """The rows of each stage that has steps."""
    essay = None if haystack is None else read_text(haystack)
    stages = {1: plan.transfer, 2: plan.tuning}
    if not any(stage.steps for stage in stages.values()):
        raise UsageError("transfer.tokens and tuning.tokens are both 0: nothing to do")
    if not source.config.eos_token_ids:
        raise UsageError(f"{source.name} has no end-of-text token, which parts the documents")
    corpus = read_corpus(
        data,
        tokenizer,
        eos=source.config.eos_token_ids[0],
        chat_loss=plan.chat_loss,
        progress=progress,
    )
    mixtures = {}
    for number, stage in stages.items():
        if stage.steps:
            share = NeedleShare(
                share=stage.needles.share,
                kinds=stage.needles.kinds,
                lengths=stage.needles.lengths,
                depths=stage.needles.depths,
                essay=essay,
            )
            mixtures[number] = corpus.mix(
                length=stage.length,
                seed=plan.seed + number,  # stage 2 reads in another order
                needles=share if stage.needles.share else None,
            )
    return mixtures


def _identity(files: Sequence[DataFile]) -> dict[str, Any]:
    """What the rows depend on, by name; two files of one name share a list."""
    found: dict[str, Any] = {}
    for file in files:
        found.setdefault(file.name, []).append(f"{file.sha256}@{file.times}")
    return found


def _earlier(
    init: str | Path, source: Source, mixers: tuple[str, ...], plan: recipe.Recipe
) -> Student:
    """The student to start from, if it fits.

    `gate_divisor` may differ: no tensor depends on it, and a larger one makes every head remember
    longer by that factor, so that a student learns to look further back than its rows are long.
    """
    student = read_student(init)
    manifest = student.manifest
    if manifest.base["sha256"] != source.identity["sha256"]:
        raise UsageError(f"init {init}: made from {manifest.base['name']}, not {source.name}")
    lawcat = replace(manifest.lawcat, gate_divisor=plan.lawcat.gate_divisor)
    options = (manifest.mixers, lawcat, manifest.lolcats or plan.lolcats)
    if options != (mixers, plan.lawcat, plan.lolcats):
        raise UsageError(f"init {init}: its mixers or their options differ from the recipe's")
    return student
