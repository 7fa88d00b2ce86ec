"""Low-rank side paths of a graph, y = W x + B (A x): constants, or slots to fill at run time.

The exporters know modules and pairs, never the methods that made them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from edgekit.artefacts.lowrank import LowRank
from edgekit.errors import AdapterError, UsageError
from edgekit.models.config import DecoderConfig
from edgekit.models.weights import WeightStore
from edgekit.runtime.adapter_file import CONFIG, read_adapter
from edgekit.runtime.lowrank import low_rank_pairs

__all__ = [
    "NO_SIDE_PATHS",
    "SidePaths",
    "check_linear",
    "chosen_slots",
    "linear_modules",
    "slot_shapes",
]

ALL, NONE = "all", "none"
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SidePaths:
    """What stands beside the weights; a module may have both kinds.

    Attributes:
        constant: pairs by module, fp32 in every weight format.
        slots: modules whose pair the runtime sets, of any rank; of rank 0 at first.
    """

    constant: Mapping[str, LowRank] = field(default_factory=dict)
    slots: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.constant or self.slots)


NO_SIDE_PATHS = SidePaths()


def linear_modules(config: DecoderConfig) -> tuple[str, ...]:
    """The modules of `mixers.graph.Graph.linears`, which alone may have side paths."""
    layers = range(config.num_layers)
    return tuple(f"model.layers.{layer}.{name}" for layer in layers for name in LINEARS)


def chosen_slots(choices: str | Sequence[str], config: DecoderConfig) -> tuple[str, ...]:
    """The modules that get slots.

    Args:
        choices: a list, or a text with commas: `all` or `none` alone; or names of modules, ends of
            names such as `q_proj`, glob patterns of either, and adapter directories, which stand
            for what they adapt.
        config: the decoder.

    Returns:
        Module paths in the model's order.

    Raises:
        UsageError: for a choice that names no linear layer.
        AdapterError: for an adapter that cannot be read, or adapts something else.
    """
    modules = linear_modules(config)
    wanted = choices.split(",") if isinstance(choices, str) else list(choices)
    if wanted == [ALL]:
        return modules
    if wanted == [NONE]:
        return ()
    found = {module for choice in wanted for module in _matching(choice.strip(), modules)}
    return tuple(module for module in modules if module in found)


def _matching(choice: str, modules: tuple[str, ...]) -> Iterable[str]:
    if (Path(choice) / CONFIG).is_file():
        return _adapted(Path(choice), modules)
    found = [m for m in modules if fnmatchcase(m, choice) or fnmatchcase(m, f"*.{choice}")]
    if not found:
        names = ", ".join(name.rpartition(".")[2] for name in LINEARS)
        raise UsageError(
            f"adapter slots {choice!r} given; allowed: {ALL}, {NONE}, an adapter's directory, "
            f"or {names} and patterns of whole names such as {modules[0]}"
        )
    return found


def _adapted(directory: Path, modules: tuple[str, ...]) -> Iterable[str]:
    adapted = list(low_rank_pairs(read_adapter(directory)))
    check_linear(adapted, modules, str(directory))
    return adapted


def check_linear(adapted: Iterable[str], modules: tuple[str, ...], where: str) -> None:
    """Refuse adapted modules that cannot have a side path.

    Raises:
        AdapterError: naming the first.
    """
    other = [module for module in adapted if module not in modules]
    if other:
        raise AdapterError(
            f"{where}: adapts {other[0]}, which can have no side path; allowed: the linear layers "
            "of attention and MLP; merge it: --adapter-mode merge"
        )


def slot_shapes(side: SidePaths, weights: WeightStore) -> dict[str, tuple[int, int]]:
    """`(out, in)` of each module with a slot, as the manifest keeps it."""
    shapes = {}
    for module in side.slots:
        out, width = weights.tensor(f"{module}.weight").shape
        shapes[module] = (out, width)
    return shapes
