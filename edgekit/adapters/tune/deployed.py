"""An adapter on the device against itself in PyTorch: a task's test set, answer by answer.

Example:
    python -m edgekit.adapters.tune.deployed smollm2-135m-instruct my-adapter \
        --task sentiment --test tasks/sentiment/test.jsonl \
        --bundle int8=merged-int8 --bundle slots=base-int4+my-adapter --engine openvino,onnx -o out

A bundle is given as NAME=DIR, or as NAME=DIR+ADAPTER to load an adapter into its slots. It writes
`out/deployed.md` and `out/deployed.json`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.adapters.tune.model import load_tuned, open_base
from edgekit.adapters.tune.scoring import (
    NEW_TOKENS,
    Scores,
    first_line,
    graded,
    labelled,
    read_examples,
    score,
)
from edgekit.command import Told, guarded, module_parser, parsed
from edgekit.config import dump
from edgekit.data.tuning_tasks import LABELS, TASKS, Example
from edgekit.errors import UsageError
from edgekit.markdown import markdown_table
from edgekit.runtime import Model, load
from edgekit.runtime.text import Tokenizer
from edgekit.wilson import wilson

__all__ = ["Deployed", "bundle_scores", "main", "measure_deployed"]

Progress = Callable[[str, int, int], None]
REFERENCE = "PyTorch, fp32"
HEADERS = ("where", "right", "95 % interval", "difference, points", "same answers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployed:
    """One place that an adapter runs at.

    Attributes:
        name: of the place.
        correct: answers that are right.
        samples: of so many.
        same: answers that are PyTorch's.
        character_error_rate: of what is written; None where the answer is chosen.
    """

    name: str
    correct: int
    samples: int
    same: int
    character_error_rate: float | None


def measure_deployed(
    source: str,
    adapter: Path,
    task: str,
    examples: Sequence[Example],
    bundles: dict[str, str],
    engines: Sequence[str],
    progress: Progress | None = None,
) -> list[Deployed]:
    """Answer the same examples everywhere.

    Args:
        source: the model, or the student, that the adapter was tuned on.
        adapter: what `edgekit tune` wrote.
        task: of `edgekit.data.tuning_tasks.TASKS`.
        examples: to answer.
        bundles: `DIR` or `DIR+ADAPTER`, by name.
        engines: to run each bundle on.
        progress: called with a step's name, its number and the count of steps.

    Returns:
        PyTorch first.

    Raises:
        EdgekitError: what opening a model, an adapter or a bundle raises.
    """
    base = open_base(source)
    places = [(name, spec, engine) for name, spec in bundles.items() for engine in engines]
    tell = progress or (lambda step, number, count: None)
    for _, spec, engine in places:
        _opened(spec, engine)  # one that cannot be opened is told now, not after the others
    tell(REFERENCE, 0, len(places) + 1)
    tokenizer = Tokenizer(base.source.directory)
    first = score(task, load_tuned(base, adapter, "fp32"), tokenizer, examples)
    found = [_deployed(REFERENCE, first, first)]
    for number, (name, spec, engine) in enumerate(places, 1):
        tell(f"{name} on {engine}", number, len(places) + 1)
        scores = bundle_scores(task, _opened(spec, engine), examples)
        found.append(_deployed(f"{name}, {engine}", scores, first))
    return found


def bundle_scores(task: str, model: Model, examples: Sequence[Example]) -> Scores:
    """A bundle's answers, found as `scoring.score` finds those of PyTorch.

    Args:
        task: of `edgekit.data.tuning_tasks.TASKS`.
        model: opened with logits="all".
        examples: to answer.
    """
    answer = _chosen if task == "sentiment" else _written
    return graded(task, [answer(model, example.prompt) for example in examples], examples)


def _chosen(model: Model, prompt: str) -> str:
    """The label of larger log-probability; what is the same but for its last token is read once."""
    read: dict[bytes, npt.NDArray[np.float32]] = {}
    scores = []
    for label in LABELS:
        ids, border = labelled(model.tokenizer, prompt, label)
        key = ids[:-1].tobytes()
        if key not in read:
            read[key] = model.session().append(ids[:-1])[0]
        logits = read[key][border - 1 :].astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        log = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        scores.append(float(log[np.arange(len(log)), ids[border:]].sum()))
    return LABELS[int(np.argmax(scores))].strip()


def _written(model: Model, prompt: str) -> str:
    return first_line(model.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0.0))


def _opened(spec: str, engine: str) -> Model:
    bundle, _, adapter = spec.partition("+")
    model = load(bundle, engine=engine, logits="all")
    if adapter:
        model.set_adapters({model.load_adapter(adapter): 1.0})
    return model


def _deployed(name: str, scores: Scores, reference: Scores) -> Deployed:
    pairs = zip(scores.answers, reference.answers, strict=True)
    return Deployed(
        name=name,
        correct=scores.correct,
        samples=scores.samples,
        same=sum(ours["answer"] == theirs["answer"] for ours, theirs in pairs),
        character_error_rate=scores.character_error_rate,
    )


def _as_markdown(found: Sequence[Deployed], command: str) -> str:
    first = found[0]
    rows = []
    for place in found:
        low, high = wilson(place.correct, place.samples)
        points = 100 * (place.correct - first.correct) / place.samples
        rows.append(
            (
                place.name,
                f"{place.correct} of {place.samples} ({place.correct / place.samples:.1%})",
                f"{low:.1%} to {high:.1%}",
                "-" if place is first else f"{points:+.1f}",
                "-" if place is first else f"{place.same} of {place.samples}",
            )
        )
    return f"{markdown_table(rows, HEADERS)}\n\nMade by:\n\n    {command}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print the table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("deployed", lambda: _made(args, command))


def _made(args: argparse.Namespace, command: str) -> str:
    bundles = dict(_named(text) for text in args.bundle)
    if len(bundles) < len(args.bundle):
        raise UsageError("a name of a bundle given twice; allowed: each once")
    examples = read_examples(args.test, args.samples)
    found = measure_deployed(
        args.source, args.adapter, args.task, examples, bundles, args.engine, Told()
    )
    text = _as_markdown(found, command)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "deployed.md").write_text(text, encoding="utf-8")
    record = json.dumps({"command": command, "places": dump(found)}, indent=1)
    (args.output / "deployed.json").write_text(record + "\n", encoding="utf-8")
    return text.rstrip("\n")


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.adapters.tune.deployed", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="what the adapter was tuned on")
    add("adapter", type=Path, metavar="ADAPTER")
    add("--task", choices=TASKS, required=True)
    add("--test", type=Path, required=True, metavar="FILE.jsonl")
    add("--samples", type=int, metavar="N", help="the first N (default: all)")
    add("--bundle", action="append", required=True, metavar="NAME=DIR[+ADAPTER]")
    add("--engine", type=lambda text: tuple(text.split(",")), default=("openvino", "onnx"))
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    return parser


def _named(text: str) -> tuple[str, str]:
    name, equals, spec = text.partition("=")
    if not (name and equals and spec):
        raise UsageError(f"bundle {text!r} given; allowed: NAME=DIR or NAME=DIR+ADAPTER")
    return name, spec


if __name__ == "__main__":
    sys.exit(main())
