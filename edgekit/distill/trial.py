"""The work of an ablation: students of every variant, their training, their figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edgekit.config import dump
from edgekit.distill import checkpoint
from edgekit.distill.ablation_report import Ablation, Scored
from edgekit.distill.assembly import Assembly, Progress
from edgekit.distill.build import student_config, student_over
from edgekit.distill.estimate import estimate
from edgekit.distill.folder import refuse_changes
from edgekit.distill.lockstep import Lockstep
from edgekit.distill.loop import Outcome, Run, train
from edgekit.distill.measuring import layer_errors, perplexities, state_bytes
from edgekit.distill.processes import Processes
from edgekit.distill.texts import read_rows
from edgekit.distill.transfer import TransferStage, new_parameters
from edgekit.distill.variants import BASE, Variants, changes
from edgekit.errors import UsageError
from edgekit.models.decoder import Decoder
from edgekit.models.precision import Precision
from edgekit.targets import cpu_facts

__all__ = ["AblationSettings", "Trial"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationSettings:
    """How to run an ablation: nothing here changes what is learned, but for rounding.

    Attributes:
        precision: of matrix products; `auto` takes bf16 where the hardware has it.
        cpu: use the CPU where there is a GPU too.
        held_out_tokens: of each held-out text, from its beginning.
        checkpoint_seconds: between checkpoints.
        stop_after: seconds after which the run saves itself and ends, to be gone on with.
    """

    precision: Precision | Literal["auto"] = "auto"
    cpu: bool = False
    held_out_tokens: int = 8192
    checkpoint_seconds: float = 120.0
    stop_after: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What an ablation works on.

    Attributes:
        work: teacher, rows and the base's student.
        variants: what is compared.
        students: by variant; they share the teacher's tensors.
        stage: trains them.
        texts: held-out rows of ids `[N, T]` on the device, by text.
    """

    work: Assembly
    variants: Variants
    students: dict[str, Decoder]
    stage: Lockstep
    texts: dict[str, torch.Tensor]

    @classmethod
    def open(
        cls,
        source: str | Path,
        variants: Variants,
        data: Sequence[str | Path],
        held_out: Sequence[Path],
        processes: Processes,
        choice: AblationSettings,
        progress: Progress | None,
    ) -> "Trial":
        """Read everything; arguments and errors are those of `ablation.ablate`."""
        work = Assembly.open(source, variants.base, data, None, None, processes, progress)
        length, texts = variants.base.transfer.length, {}
        for path in held_out:
            if path.stem in texts:
                raise UsageError(f"two held-out texts are called {path.stem}; rename one")
            rows = read_rows(path, work.tokenizer, length=length, tokens=choice.held_out_tokens)
            texts[path.stem] = rows.to(processes.device)
        if not texts:
            raise UsageError("no held-out text given; give one or more to measure on")
        students = {BASE: work.student}
        for name, plan in variants.recipes.items():
            if name != BASE:
                config = student_config(work.source.config, plan)
                students[name] = student_over(work.teacher, config)
        stages = {
            name: TransferStage(work.teacher, students[name], plan.transfer, processes.autocast)
            for name, plan in variants.recipes.items()
        }
        stage = Lockstep(work.teacher, stages, processes.autocast)
        return cls(work=work, variants=variants, students=students, stage=stage, texts=texts)

    @property
    def layers(self) -> tuple[int, ...]:
        """That are learned."""
        mixers = enumerate(self.work.student.config.mixers)
        return tuple(i for i, mixer in mixers if mixer != "softmax")

    def train(self, folder: Path, choice: AblationSettings, progress: Progress | None) -> Outcome:
        """Train from where `folder` is."""
        base = self.variants.base
        changed = {name: dump(changes(base, r)) for name, r in self.variants.recipes.items()}
        fingerprint = self.work.fingerprint | {"variants": changed}
        saved = checkpoint.latest(folder)
        if saved:
            refuse_changes(saved, fingerprint)
        run = Run(
            folder=folder,
            processes=self.work.processes,
            fingerprint=fingerprint,
            seed=base.seed,
            checkpoint_seconds=choice.checkpoint_seconds,
            stop_after=choice.stop_after,
            progress=progress,
        )
        return train(self.stage, base.transfer, self.work.mixtures[1].batch, run, saved)

    def measure(
        self, outcome: Outcome, records: Sequence[Mapping[str, Any]], progress: Progress | None
    ) -> Ablation:
        """Every figure of every student."""
        work, plan, config = self.work, self.variants.base, self.work.teacher.config
        device = work.processes.description
        cpu = cpu_facts().get("model name") if work.processes.device.type == "cpu" else None
        whole = len(self.layers) == config.num_layers
        found: dict[str, dict[str, float]] = {name: {} for name in ("teacher", *self.students)}
        if whole:
            models = {"teacher": work.teacher, **self.students}
            found = perplexities(models, self.texts, work.processes.autocast, progress=progress)
        return Ablation(
            description=self.variants.description,
            teacher=work.source.name,
            layers=self.layers,
            of_layers=config.num_layers,
            tokens=outcome.tokens,
            length=plan.transfer.length,
            batch=plan.transfer.batch,
            seed=plan.seed,
            device=f"{device} ({cpu})" if cpu else device,
            seconds=round(outcome.seconds, 1),
            data=tuple(dump(file) for file in work.mixtures[1].files),
            held_out={text: len(rows) for text, rows in self.texts.items()},
            teacher_perplexity=found["teacher"],
            teacher_bytes=state_bytes(work.teacher, self.layers, work.processes.autocast),
            scored=self._scored(found, records, progress),
        )

    def _scored(
        self,
        perplexity: Mapping[str, dict[str, float]],
        records: Sequence[Mapping[str, Any]],
        progress: Progress | None,
    ) -> tuple[Scored, ...]:
        """The variants, the smallest error first."""
        rows = torch.cat(list(self.texts.values()))
        autocast, teacher = self.work.processes.autocast, self.work.teacher
        errors = layer_errors(teacher, self.students, rows, autocast, progress=progress)
        seconds = dict(zip(self.students, self.stage.seconds.tolist(), strict=True))
        scored = []
        for name, student in self.students.items():
            mean, base = errors[name].mean(dim=1), errors[BASE].mean(dim=1)
            lost = [r["tokens"] for r in records if r["students"][name] is None]
            new = [p for i in self.layers for p in new_parameters(student, i).values()]
            scored.append(
                Scored(
                    name=name,
                    changes=changes(self.variants.base, self.variants.recipes[name]),
                    error=estimate(mean),
                    against_base=None if name == BASE else estimate(mean - base),
                    layers=tuple(errors[name].mean(dim=0).tolist()),
                    perplexity=perplexity[name],
                    state_bytes=state_bytes(student, self.layers, autocast),
                    parameters=sum(parameter.numel() for parameter in new),
                    seconds=round(seconds[name], 3),
                    stopped_at=min(lost) if lost else None,
                )
            )
        return tuple(sorted(scored, key=lambda s: s.error.value))
