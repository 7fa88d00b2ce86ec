"""The settings of gated linear attention's Triton programs, and how one is run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from edgekit.kernels.dispatch import interpreted
from edgekit.kernels.gla import programs_backward, programs_forward
from edgekit.kernels.gla.limits import WIDEST
from edgekit.kernels.gla.reference import GATE_BOUND
from edgekit.kernels.launch import block_of, launch

__all__ = [
    "CHUNK",
    "EXACT_CHUNK",
    "SMALL_CHUNK",
    "Plan",
    "Setting",
    "blocks_of",
    "program_of",
    "settings_of",
]

CHUNK, SMALL_CHUNK = 64, 32  # tokens: from sm_90 on, and before, where 64 find too few registers
EXACT_CHUNK = 16  # where fp32 is multiplied: a longer chunk keeps kilobytes of registers in memory


class Setting(NamedTuple):
    """How a program is run; its results do not depend on it, but for rounding."""

    warps: int
    stages: int  # of the software pipeline
    features: int  # of a block
    values: int  # of a block
    chunk: int = CHUNK  # tokens at most


# The others are split into blocks of values.
BY_FEATURES = ("forward_states", "backward_states", "backward_queries", "backward_keys")
# By the wider of features and values. None keeps a register in memory:
# `python -m edgekit.kernels.offline` prints what they use.
SETTINGS: Mapping[int, Mapping[str, Setting]] = {
    64: {
        "forward_states": Setting(8, 2, 64, 64),
        "forward_outputs": Setting(4, 2, 64, 64),
        "forward_whole": Setting(8, 2, 64, 64, chunk=32),
        "forward_steps": Setting(4, 1, 64, 64),
        "backward_states": Setting(8, 2, 32, 64),
        "backward_queries": Setting(8, 1, 64, 64),
        "backward_keys": Setting(8, 1, 64, 64),
        "backward_values": Setting(4, 1, 64, 64),
    },
    128: {
        "forward_states": Setting(8, 2, 32, 128),
        "forward_outputs": Setting(8, 2, 128, 64),
        "forward_whole": Setting(8, 2, 128, 32, chunk=32),
        "forward_steps": Setting(4, 1, 128, 64),
        "backward_states": Setting(8, 2, 64, 128),
        "backward_queries": Setting(4, 1, 64, 128),
        "backward_keys": Setting(8, 1, 64, 128),
        "backward_values": Setting(8, 1, 128, 64),
    },
}
# Where fp32 is multiplied: what differs. `forward_whole` spills in every setting that was tried.
EXACT: Mapping[int, Mapping[str, Setting]] = {
    64: {"forward_whole": Setting(8, 2, 64, 16)},
    128: {
        "forward_whole": Setting(8, 1, 128, 16),
        "backward_queries": Setting(8, 1, 32, 128),
        "backward_keys": Setting(8, 1, 32, 128),
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything about a call but the tensors."""

    time: int
    heads: int
    states: int
    features: int
    values: int
    gates: int
    chunk: int
    eps: float | None
    given: bool
    operand: torch.dtype
    precision: str

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        chunk: int,
        eps: float | None,
        given: bool,
    ) -> "Plan":
        """The plan of a call; `eps` is None without a denominator, `given` if a state enters."""
        # The interpreter does not know bf16, and fp16 has too few exponents for the anchor.
        narrow = all(x.dtype in (torch.bfloat16, torch.float16) for x in (q, k, v))
        operand = torch.bfloat16 if narrow and not interpreted() else torch.float32
        exact = operand == torch.float32 and not interpreted()
        highest = torch.get_float32_matmul_precision() == "highest"
        return cls(
            time=q.shape[1],
            heads=q.shape[2],
            states=k.shape[2],
            features=k.shape[3],
            values=v.shape[3],
            gates=g.shape[3],
            chunk=min(chunk, EXACT_CHUNK) if exact else chunk,
            eps=eps,
            given=given,
            operand=operand,
            precision="ieee" if highest else "tf32",
        )

    def setting(self, program: str) -> Setting:
        """How it is run, its blocks no wider than the tensors and its chunk no longer than ours."""
        width = 64 if max(self.features, self.values) <= 64 else WIDEST
        setting = settings_of(width, self.operand)[program]
        return setting._replace(
            features=min(setting.features, block_of(self.features)),
            values=min(setting.values, block_of(self.values)),
            chunk=min(setting.chunk, self.chunk),
        )

    @property
    def gate_shares(self) -> int:
        """Programs that a gate's gradient is the sum of."""
        whole = self.gates > 1
        return 1 if whole else blocks_of(self.features, self.setting("backward_keys").features)

    @property
    def in_one_pass(self) -> bool:
        """Whether `forward_whole` finds enough registers: not for fp32, nor for wide groups."""
        wide = max(self.features, self.values) > 64
        return self.operand == torch.bfloat16 and not (wide and self.heads > self.states)

    @property
    def values_with_keys(self) -> bool:
        """Whether `backward_keys` has all features at hand, which the gradients of v need."""
        return max(self.features, self.values) <= 64

    def constants(self, program: str, *, with_values: bool = False) -> dict[str, Any]:
        """The program's compile-time arguments."""
        setting = self.setting(program)
        known = {
            "S": self.states,
            "G": self.heads // self.states,
            "F": self.features,
            "V": self.values,
            "GATES": self.gates,
            "C": setting.chunk,
            "BF": setting.features,
            "BV": setting.values,
            "BOUND": GATE_BOUND,
            "WITH_VALUES": with_values,
            "NORMALISE": self.eps is not None,
            "SCALE": self.features**-0.5,
            "GIVEN": self.given,
            "OP": tl.bfloat16 if self.operand == torch.bfloat16 else tl.float32,
            "DOT": self.precision,
        }
        wanted = program_of(program).arg_names
        return {name: value for name, value in known.items() if name in wanted}

    def launch(
        self, program: str, grid: tuple[int, ...], *arguments: Any, with_values: bool = False
    ) -> None:
        """Run a program; axis 0 of the grid counts its blocks of features or values too."""
        setting = self.setting(program)
        by_features = program in BY_FEATURES
        split = (
            blocks_of(self.features, setting.features)
            if by_features
            else blocks_of(self.values, setting.values)
        )
        constants = self.constants(program, with_values=with_values)
        options = {"num_warps": setting.warps, "num_stages": setting.stages}
        launch(
            program_of(program), (grid[0] * split, *grid[1:]), *arguments, **constants, **options
        )


def program_of(name: str) -> Any:
    """What `triton.jit` returned, by its name."""
    return getattr(programs_forward, name, None) or getattr(programs_backward, name)


def settings_of(width: int, operand: torch.dtype) -> Mapping[str, Setting]:
    """How the programs for heads of `width`, 64 or 128, are run, by their names."""
    differing = EXACT[width] if operand == torch.float32 else {}
    return {**SETTINGS[width], **differing}


def blocks_of(width: int, block: int) -> int:
    """How many blocks hold `width`."""
    return int(triton.cdiv(width, block))
