"""Which operators take the time of a call: sums by their type, as the engine itself counts them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.runtime.engine import OperatorTime
from edgekit.runtime.model import Model
from edgekit.runtime.workload import Options, at_depths, greedy, open_model, prompt_ids

__all__ = ["Operator", "Operators", "measure_operators"]

WARM, STEPS = 2, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """One type of operator in one step of the measurement; `count` and `ms` are of a mean call."""

    type: str
    count: float
    ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Operators:
    """What the calls of one step took.

    Attributes:
        test: `pp1024`, reading a prompt, or `tg @ 4096`, decoding one token at a depth.
        calls: of the graph; a long prompt takes several.
        operators: the slowest first.
    """

    test: str
    calls: int
    operators: tuple[Operator, ...]

    @property
    def ms(self) -> float:
        """Of all operators in a mean call."""
        return sum(operator.ms for operator in self.operators)


def measure_operators(bundle: str | Path, options: Options) -> tuple[Operators, ...]:
    """Load a bundle with profiling, read the prompts, decode at the depths.

    Counting slows a call a little: times are for comparing operators, not for speed.

    Raises:
        BundleError: if it is not a sound bundle.
        EngineError: if the engine or device is missing.
    """
    model = open_model(bundle, options, profiling=True)
    spans = [*_prompts(model, options), *_steps(model, options)]
    times = model.operator_times()
    return tuple(_summed(test, times[first:end]) for test, first, end in spans)


def _prompts(model: Model, options: Options) -> list[tuple[str, int, int]]:
    """Which calls read which prompt, after one reading that does not count: first and end."""
    spans = []
    for length in options.prompts:
        ids = prompt_ids(model, length)
        model.session().append(ids)
        before = model.calls
        model.session().append(ids)
        spans.append((f"pp{length}", before, model.calls))
    return spans


def _steps(model: Model, options: Options) -> list[tuple[str, int, int]]:
    ids, spans = prompt_ids(model, options.longest), []
    for depth, session, logits in at_depths(model, ids, options.depths):
        greedy(session, logits, WARM)
        before = model.calls
        greedy(session, logits, STEPS)
        spans.append((f"tg @ {depth}", before, model.calls))
    return spans


def _summed(test: str, times: Sequence[dict[str, OperatorTime]]) -> Operators:
    count: dict[str, float] = defaultdict(float)
    ms: dict[str, float] = defaultdict(float)
    for call in times:
        for kind, time in call.items():
            count[kind] += time.nodes / len(times)
            ms[kind] += 1e3 * time.seconds / len(times)
    slowest = sorted(ms, key=lambda kind: -ms[kind])
    operators = (Operator(type=kind, count=count[kind], ms=ms[kind]) for kind in slowest)
    return Operators(test=test, calls=len(times), operators=tuple(operators))
