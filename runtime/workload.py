"""What the measurements feed a model: the same text, depths and steps for time and memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.errors import UsageError
from edgekit.runtime import Model, Session, load
from edgekit.runtime.engine import Floats, Integers

__all__ = [
    "Options",
    "Progress",
    "at_depths",
    "check_context",
    "greedy",
    "open_model",
    "prompt_ids",
]

Progress = Callable[[str, int, int], None]

TEXT = (
    "The river had been rising since noon, and by the time the lamps were lit the old bridge "
    "stood in the middle of a lake. Nobody in the village could remember such a spring. The miller "
    "counted his sacks twice, moved them to the loft, and sent his son to ask whether the road to "
    "the north was still open; it was, said the postman, but only for those in high boots. "
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        prompts: prompt lengths in tokens.
        depths: tokens read before decoding is timed; 0 starts from a single token.
        tokens: tokens decoded at each depth.
        repeat: timed repetitions of each figure, after one that is not counted.
        engine: `openvino` or `onnx`; None: as `edgekit.runtime.load` chooses.
        device: the engine's device name; None: the target's.
        threads: CPU threads; None: the target's, or else the engine's choice.
        graph: OpenVINO's form of the decoder; None: the target's.
        memory: whether to run the second process that measures memory.
        starting: whether to run a process that loads twice, with and without compiled blobs.
        operators: whether to take the time of every type of operator, in one more load.
        adapters: directories with weights, for a bundle with adapter slots.
    """

    prompts: tuple[int, ...] = (128, 1024)
    depths: tuple[int, ...] = (0, 4096)
    tokens: int = 64
    repeat: int = 3
    engine: str | None = None
    device: str | None = None
    threads: int | None = None
    graph: str | None = None
    memory: bool = True
    starting: bool = False
    operators: bool = False
    adapters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: naming the option.
        """
        least = {"prompt": (1, self.prompts), "depth": (0, self.depths)}
        least |= {"gen": (1, (self.tokens,)), "repeat": (1, (self.repeat,))}
        for name, (bound, values) in least.items():
            if min(values, default=bound) < bound:
                raise UsageError(f"{name} {min(values)} given; allowed: {bound} or more")
        if not self.prompts and not self.depths:
            raise UsageError("nothing to measure: give a prompt length or a depth")

    @property
    def longest(self) -> int:
        """Tokens of text that the whole measurement needs."""
        return max((*self.prompts, *self.depths, 1))


def open_model(
    bundle: str | Path,
    options: Options,
    *,
    profiling: bool = False,
    cache_dir: str | None = None,
) -> Model:
    """Load the bundle and set the adapters as `options` ask; raises what these raise."""
    model = load(
        bundle,
        engine=options.engine,
        device=options.device,
        threads=options.threads,
        cache_dir=cache_dir,
        graph=options.graph,
        profiling=profiling,
    )
    model.set_adapters({model.load_adapter(path): weight for path, weight in options.adapters})
    return model


def check_context(model: Model, options: Options) -> None:
    """Refuse lengths that the model's softmax layers cannot see.

    Raises:
        UsageError: with the length and the limit.
    """
    limit = model.manifest.model.context_length
    longest = max((*options.prompts, *(max(d, 1) + options.tokens for d in options.depths)))
    if limit is not None and longest > limit:
        raise UsageError(
            f"{longest} tokens asked for, but the softmax layers of this bundle see {limit}; "
            "lower --prompt or --depth"
        )


def prompt_ids(model: Model, count: int) -> Integers:
    """`count` token ids of English prose, int64 `[count]`; repeats itself."""
    return np.resize(model.tokenizer.encode(TEXT, add_special_tokens=False), count)


def at_depths(
    model: Model,
    ids: Integers,
    depths: Sequence[int],
    tell: Callable[[str], None] = lambda step: None,
) -> Iterator[tuple[int, Session, Floats]]:
    """Read `ids` on from depth to depth in one session, and `tell` before each.

    Yields:
        The depth, the session that has read so many tokens (at least one), and the logits `[1, V]`
        of its last position. The caller may decode; the session is put back afterwards.
    """
    session = model.session()
    read, logits = 0, np.empty((0, 0), dtype=np.float32)
    for depth in sorted(set(depths)):
        tell(f"decode at depth {depth}")
        end = max(depth, 1)
        logits = session.append(ids[read:end]) if end > read else logits
        read = end
        here = session.snapshot()
        yield depth, session, logits
        session.restore(here)


def greedy(session: Session, logits: Floats, count: int) -> tuple[list[float], list[int]]:
    """Decode greedily from `logits [1, V]`: the seconds of each step, and the tokens."""
    times, output = [], []
    for _ in range(count):
        token = int(logits[0].argmax())
        start = time.perf_counter()
        logits = session.append(np.array([token], dtype=np.int64))
        times.append(time.perf_counter() - start)
        output.append(token)
    return times, output
