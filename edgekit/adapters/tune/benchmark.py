"""Methods compared at equal steps: for each task the rate is tuned first, then every seed is run.

Everything lies in one folder: `adapters/TASK/METHOD-SEED` is what `tune` writes, `TASK.jsonl` the
journal of scores, `answers/` what was answered. What is there already is not done again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgekit.adapters.tune.manifest import MANIFEST, TuneManifest, read_tune
from edgekit.adapters.tune.model import Base, load_tuned, new_tuned, open_base
from edgekit.adapters.tune.recipe import METHODS, Method, Recipe, load_recipe
from edgekit.adapters.tune.recorder import write_records
from edgekit.adapters.tune.run import Settings, tune
from edgekit.adapters.tune.scoring import Scores, read_examples, score
from edgekit.config import dump
from edgekit.data.tuning_tasks import PARTS, TASKS
from edgekit.errors import UsageError
from edgekit.journal import Journal
from edgekit.models.precision import Precision, choose_precision
from edgekit.runtime.text import Tokenizer

__all__ = ["BASE", "RATES", "Benchmark", "measure"]

Progress = Callable[[str, int, int], None]
BASE = "base"  # the row of the model without an adapter
RATES: Mapping[Method, tuple[float, ...]] = {
    "aflora": (5e-3, 1e-2, 2e-2),
    "lora": (2e-4, 5e-4, 1e-3),
    "vera": (2e-2, 5e-2, 1e-1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """What to compare, and how.

    Attributes:
        source: the model, or a student.
        student: of `source`; None: `source` as it is.
        tasks: of `edgekit.data.tuning_tasks.TASKS`.
        methods: of `METHODS`.
        seeds: the first one tunes the rate for all.
        rates: to try, by method.
        steps: of every training.
        search_steps: of every trial of a rate.
        batch: rows per step.
        micro_batch: rows per forward pass.
        validation: examples that a rate is judged on.
        test: examples that an adapter is judged on.
        overrides: keys of every recipe, by dotted name.
        precision: of matrix products.
        cpu: use the CPU where there is a GPU too.
    """

    source: str
    student: str | None = None
    tasks: tuple[str, ...] = TASKS
    methods: tuple[Method, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: Mapping[Method, tuple[float, ...]] = field(default_factory=lambda: dict(RATES))
    steps: int = 200
    search_steps: int = 50
    batch: int = 16
    micro_batch: int = 16
    validation: int = 200
    test: int = 500
    overrides: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "fp32"
    cpu: bool = False

    def __post_init__(self) -> None:
        """Check what is checked nowhere else.

        Raises:
            UsageError: naming what is outside.
        """
        for name, allowed in (("tasks", TASKS), ("methods", METHODS)):
            unknown = [item for item in getattr(self, name) if item not in allowed]
            if unknown or not getattr(self, name):
                given = repr(unknown[0]) if unknown else "none"
                raise UsageError(f"{name} {given} given; allowed: {', '.join(allowed)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"seeds {self.seeds} given; allowed: one or more, each once")
        for name in ("steps", "search_steps", "validation", "test"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} given; allowed: 1 or more")

    def recipe(self, method: Method, seed: int) -> Recipe:
        """The shipped recipe of `method`, at these steps."""
        own = {
            "steps": self.steps,
            "search_steps": self.search_steps,
            "batch": self.batch,
            "micro_batch": self.micro_batch,
            "seed": seed,
        }
        return load_recipe(method, {**own, **self.overrides})


def measure(
    benchmark: Benchmark, data: Path, folder: Path, progress: Progress | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Tune and score whatever `folder` does not hold yet.

    Args:
        benchmark: what to compare.
        data: what `edgekit.data.tuning_tasks` wrote.
        folder: created if need be.
        progress: called with a step's name, its number and the count of steps.

    Returns:
        For each task a record for the base, then one for each method and seed.

    Raises:
        EdgekitError: what tuning or reading raises; what was done stays.
    """
    base = open_base(benchmark.source, benchmark.student)
    tokenizer = Tokenizer(base.source.directory)
    return {
        task: _Task(benchmark, base, tokenizer, data / task, folder, progress).records()
        for task in benchmark.tasks
    }


class _Task:
    """One task of a benchmark."""

    def __init__(
        self,
        benchmark: Benchmark,
        base: Base,
        tokenizer: Tokenizer,
        data: Path,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self._benchmark, self._base, self._tokenizer = benchmark, base, tokenizer
        self._folder, self._progress, self._name = folder, progress, data.name
        files = {part: data / f"{part}.jsonl" for part in PARTS}
        missing = [str(path) for path in files.values() if not path.is_file()]
        if missing:
            raise UsageError(
                f"{missing[0]}: missing; give a folder that `python -m edgekit.data.tuning_tasks` "
                "wrote"
            )
        self._train = files["train"]
        self._test = read_examples(files["test"], benchmark.test)
        self._validation = folder / "validation" / f"{self._name}.jsonl"
        self._validation.parent.mkdir(parents=True, exist_ok=True)
        held_out = read_examples(files["validation"], benchmark.validation)
        write_records(self._validation, [example.record for example in held_out])
        # Methods and seeds may be added later; the first seed, which finds the rates, must stay.
        settings = {k: v for k, v in dump(benchmark).items() if k not in ("tasks", "methods")}
        settings["seeds"] = benchmark.seeds[0]
        settings |= {"base": base.source.identity["sha256"], "student": base.student_record}
        settings |= {"test": [example.id for example in self._test]}
        self._journal = Journal(folder / f"{self._name}.jsonl", settings)

    def records(self) -> list[dict[str, Any]]:
        """The base's, then those of every method and seed."""
        found = [self._record(BASE, None)]
        for method in self._benchmark.methods:
            found += [self._record(method, seed) for seed in self._benchmark.seeds]
        return found

    def _record(self, method: Method | str, seed: int | None) -> dict[str, Any]:
        for record in self._journal.records:
            if (record["method"], record["seed"]) == (method, seed):
                return record
        manifest = None if seed is None else self._tuned(_known(method), seed)
        scores = self._scored(method, seed)
        answers = self._folder / "answers" / f"{self._name}-{method}-{seed}.jsonl"
        answers.parent.mkdir(exist_ok=True)
        write_records(answers, scores.answers)
        record = {
            "method": method,
            "seed": seed,
            "correct": scores.correct,
            "samples": scores.samples,
            "character_error_rate": scores.character_error_rate,
            **({} if manifest is None else _figures(manifest)),
        }
        self._journal.append(record)
        return record

    def _tuned(self, method: Method, seed: int) -> TuneManifest:
        """The adapter, tuned now if it is not there; the first seed finds the rate."""
        benchmark, out = self._benchmark, self._adapter(method, seed)
        if (out / MANIFEST).is_file():
            return read_tune(out)
        plan, first = benchmark.recipe(method, seed), benchmark.seeds[0]
        rates = benchmark.rates[method] if seed == first else ()
        if seed != first:
            plan = replace(plan, lr=float(self._tuned(method, first).recipe["lr"]))
        report = tune(
            benchmark.source,
            out,
            plan,
            data=[self._train],
            student=benchmark.student,
            held_out=self._validation,
            settings=Settings(
                precision=benchmark.precision, cpu=benchmark.cpu, lr_search=tuple(rates)
            ),
            resume=True,
            progress=self._named(f"{self._name}, {method}, seed {seed}"),
        )
        assert report.manifest is not None  # nothing stops it early
        return report.manifest

    def _scored(self, method: Method | str, seed: int | None) -> Scores:
        told = self._named(f"{self._name}, {method}")
        told("scoring", 0, 1)
        benchmark = self._benchmark
        precision = choose_precision(benchmark.precision, cpu=benchmark.cpu)
        if seed is None:  # a fresh adapter changes nothing
            model = new_tuned(self._base, benchmark.recipe("lora", 0), precision)
        else:
            model = load_tuned(self._base, self._adapter(method, seed), precision)
        return score(self._name, model, self._tokenizer, self._test)

    def _adapter(self, method: Method | str, seed: int) -> Path:
        return self._folder / "adapters" / self._name / f"{method}-{seed}"

    def _named(self, name: str) -> Progress:
        progress = self._progress
        if progress is None:
            return lambda step, number, count: None
        return lambda step, number, count: progress(f"{name}: {step}", number, count)


def _known(method: str) -> Method:
    return next(known for known in METHODS if known == method)


def _figures(manifest: TuneManifest) -> dict[str, Any]:
    """What a row of the table says of training."""
    return {
        "lr": manifest.recipe["lr"],
        "search": dump(manifest.search),
        "steps": manifest.steps,
        "trainable": dump(manifest.trainable),
        "memory": dump(manifest.memory),
        "seconds_per_step": manifest.seconds_per_step,
        "held_out_loss": manifest.metrics["held_out_loss"],
        "device": manifest.device,
        "versions": manifest.versions,
    }
