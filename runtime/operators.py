"""Which operators take the time of a call: sums by their type, as the engine itself counts them."""

from dataclasses import dataclass
from pathlib import Path

from edgekit.runtime.model import Model
from edgekit.runtime.workload import Options, at_depths, greedy, open_model, prompt_ids

__all__ = ["Operator", "Operators", "measure_operators"]

PROMPTS, STEPS = 2, 16


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
    """Read the prompts and decode at the depths, each in a model of its own that takes times.

    Counting slows a call a little: times are for comparing operators, not for speed. A model of its
    own, since OpenVINO tells the mean of all calls that a model has made.

    Raises:
        BundleError: if it is not a sound bundle.
        EngineError: if the engine or device is missing.
    """
    reader = open_model(bundle, options)
    found = []
    for length in options.prompts:
        ids = prompt_ids(reader, length)
        model = open_model(bundle, options, profiling=True)
        for _ in range(PROMPTS):
            model.session().append(ids)
        found.append(_summed(f"pp{length}", model))
    ids = prompt_ids(reader, options.longest)
    for depth, session, logits in at_depths(reader, ids, options.depths):
        model = open_model(bundle, options, profiling=True)
        timed = model.session()
        timed.restore(session.snapshot())
        greedy(timed, logits, STEPS)
        found.append(_summed(f"tg @ {depth}", model))
    return tuple(found)


def _summed(test: str, model: Model) -> Operators:
    times = model.operator_times()
    slowest = sorted(times.items(), key=lambda item: -item[1].seconds)
    return Operators(
        test=test,
        calls=model.calls,
        operators=tuple(
            Operator(type=kind, count=time.nodes, ms=1e3 * time.seconds) for kind, time in slowest
        ),
    )
