"""What an inference engine offers a session; `ov.py` and `ort.py` implement it.

Shapes: B batch, T tokens of one call, S tokens so far, V vocabulary. A state's key is
`{layer}.{kind}`, such as `3.ssm`, on both engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.bundle import StateRecord

if TYPE_CHECKING:
    from edgekit.runtime.lowrank import Pair

__all__ = [
    "Array",
    "Engine",
    "EngineRequest",
    "EngineSettings",
    "Floats",
    "Integers",
    "OperatorTime",
    "call_shape",
    "state_key",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How to compile a bundle.

    Attributes:
        device: the engine's device name, such as `CPU` or `GPU.0`.
        logits: whether a call answers for its last position or for all of them.
        threads: CPU threads; None leaves the choice to the engine.
        cache_dir: where compiled blobs may be kept between runs; None: nowhere.
        precision: the arithmetic to ask for, such as `f32`.
        hints: properties of OpenVINO by name; ONNX Runtime has none.
        graph: `dynamic`, `stepped` or `static`, as `targets.Target.graph` says it (OpenVINO).
        profiling: whether to take the time of every operator, which slows calls a little.
    """

    device: str
    logits: Literal["last", "all"]
    threads: int | None
    cache_dir: Path | None
    precision: str
    profiling: bool = False
    hints: Mapping[str, str] = field(default_factory=dict)
    graph: str = "dynamic"


class OperatorTime(NamedTuple):
    """How many operators of one type ran in a mean call, and for how long."""

    nodes: float
    seconds: float


class EngineRequest(Protocol):
    """One sequence (or batch of them) in flight: its carried state and its calls.

    Not safe to use from two threads at once; several requests of one engine are.
    """

    @property
    def image_mass(self) -> Floats | None:
        """Share of attention that the last call's last position gave to pictures, fp32 `[B, 1]`.

        None before the first call, and where the graph does not say.
        """
        ...

    def infer(self, feeds: Mapping[str, Array]) -> Floats:
        """Run the graph once and keep the state.

        Args:
            feeds: the graph's inputs that `Engine.inputs` names, contiguous; the first one is
                `input_ids [B, T]` or `inputs_embeds [B, T, D]`.

        Returns:
            logits `[B, 1, V]`, or `[B, T, V]` if compiled for all; the caller's to keep.
        """
        ...

    def embed(self, ids: Integers) -> Floats:
        """Embeddings `[B, T, D]` of `ids [B, T]`, where the graph reads them (`inputs_embeds`)."""
        ...

    def reset(self, batch: int) -> None:
        """Forget everything; the next call starts `batch` new sequences, with the same adapters."""
        ...

    def use_adapters(self, lowered: Any) -> None:
        """Compute with what `Engine.lowered` returned from now on; states stay as they are."""
        ...

    def reorder(self, rows: Integers) -> None:
        """Make row i of the state what row `rows[i]` was; more or fewer rows change the batch."""
        ...

    def read_states(self) -> dict[str, Array]:
        """A copy of every state by key, the growing ones at their exact length."""
        ...

    def write_states(self, states: Mapping[str, Array]) -> None:
        """Continue from what `read_states` returned, bit for bit."""
        ...


class Engine(Protocol):
    """A compiled bundle: one copy of the weights for any number of requests."""

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the graph's inputs that a session may feed."""
        ...

    @property
    def compile_seconds(self) -> float:
        """Time that reading and compiling the model took."""
        ...

    @property
    def calls(self) -> int:
        """Calls of the decoder's graph so far, by all requests; 0 without `profiling`."""
        ...

    def operator_times(self) -> dict[str, OperatorTime]:
        """Of a mean call, by the operators' type; all calls should be of one length.

        The graph must be compiled with `profiling`; ask once, when all is done.
        """
        ...

    def request(self, batch: int) -> EngineRequest:
        """A new request with empty states and no adapters."""
        ...

    def look(self, feeds: Mapping[str, Array]) -> Floats:
        """Embeddings of pictures, `[..., D]`, where the bundle reads them.

        Args:
            feeds: the pixels first, then what else the graphs may ask for, by name.
        """
        ...

    def lowered(self, pairs: "Mapping[str, Pair]") -> Any:
        """Adapters by module as this engine wants them, for any number of requests.

        Args:
            pairs: for modules with a slot; the others get rank 0.
        """
        ...


def call_shape(feeds: Mapping[str, Array]) -> tuple[int, int]:
    """B and T of a call, by its first input."""
    batch, length = next(iter(feeds.values())).shape[:2]
    return batch, length


def state_key(record: StateRecord) -> str:
    """The engine-independent name of a state."""
    return f"{record.layer}.{record.kind}"
