"""Host side of the Triton form of convolution and feature map; the plan is in `programs`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from edgekit.errors import UsageError
from edgekit.kernels.conv_feature import programs
from edgekit.kernels.conv_feature.limits import declined
from edgekit.kernels.conv_feature.reference import FEATURE_FLOOR, check_arguments
from edgekit.kernels.dispatch import interpreted
from edgekit.kernels.launch import block_of, launch
from edgekit.kernels.offline import Build
from edgekit.kernels.precision import in_bf16, widened
from edgekit.kernels.sequences import Sequences

__all__ = ["builds", "conv_feature"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How the programs are launched.

    Attributes:
        tokens: of a tile.
        inputs: of a tile, at most.
        warps: of a program.
        stages: of the pipeline over a program's products.
        tiles: that one program of `to_lagged` takes in turn; then it stores its share.
    """

    tokens: int
    inputs: int
    warps: int
    stages: int
    tiles: int


# By the columns of a tile, and whether products are in bf16.
SETTINGS: Mapping[tuple[int, bool], Setting] = {
    (32, True): Setting(tokens=128, inputs=64, warps=8, stages=3, tiles=8),
    (64, True): Setting(tokens=128, inputs=64, warps=8, stages=3, tiles=8),
    (128, True): Setting(tokens=128, inputs=32, warps=8, stages=3, tiles=8),
    (32, False): Setting(tokens=64, inputs=32, warps=8, stages=2, tiles=16),
    (64, False): Setting(tokens=32, inputs=32, warps=8, stages=2, tiles=32),
    (128, False): Setting(tokens=32, inputs=32, warps=8, stages=2, tiles=32),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What the programs of a call share.

    Attributes:
        sequences: of the call.
        lead: of each sequence, the padding before its first token, int32 `[N]`; None: no padding.
        last: the end of its last token, int32 `[N]`; None: no padding.
        setting: how programs are launched.
        sizes: constants of every program.
        operands: dtype of what is multiplied.
    """

    sequences: Sequences
    lead: torch.Tensor | None
    last: torch.Tensor | None
    setting: Setting
    sizes: Mapping[str, int]
    operands: torch.dtype

    @property
    def bounds(self) -> tuple[torch.Tensor | None, ...]:
        """What every program is told of where sequences and their padding end."""
        return self.sequences.offsets, self.lead, self.last

    @property
    def constants(self) -> dict[str, int]:
        """Of programs that go through tokens and columns."""
        up = self.operands == torch.float32
        options = {"num_warps": self.setting.warps, "num_stages": self.setting.stages}
        return {**self.sizes, "BT": self.setting.tokens, "UP": up, **options}


def conv_feature(
    x: torch.Tensor,
    taps: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal convolution, then the features of each head, one program per tile.

    Arguments, results and errors are those of `reference.conv_feature`. Besides, no argument may be
    fp64 and f is at most 128, and a mask has its zeros at the ends of rows. Sums are in fp32;
    products are in bf16 where x or autocast is, and in fp32 otherwise.
    """
    check_arguments(x, taps, weight, tail, mask, cu_seqlens)
    reason = declined(x, taps, weight, tail)
    if reason is not None:
        raise UsageError(f"the Triton form of conv_feature: {reason}. Use the form `torch`")
    plan = _plan(x, taps, weight, mask, cu_seqlens)
    history = None if tail is None else tail.mT.contiguous()  # as x is laid out: channels last
    arguments = (x.contiguous(), _lagged(taps, weight), history, plan, dtype or torch.float32)
    phi, after = _ConvFeature.apply(*arguments)  # type: ignore[no-untyped-call]
    return phi, after.mT.contiguous()


def builds() -> tuple[Build, ...]:
    """The programs as they are launched for heads of 64 and 128.

    With all that is optional, which takes most registers, and in bf16 without it too, where the
    pipeline takes most shared memory.
    """
    cases = ((64, True, True), (64, True, False), (128, True, True), (128, True, False))
    stepped = tuple(b for case in (*cases, (64, False, True)) for b in _builds(*case))
    return (*stepped, _carried_build())


def _builds(width: int, narrow: bool, extras: bool) -> tuple[Build, ...]:
    """Of one width of heads."""
    operands = "bf16" if narrow else "fp32"
    setting, sizes = _sizes(9, width, width // 2, 4, narrow)
    kinds = dict.fromkeys(("p_x", "p_v", "p_du", "p_phi", "p_dphi", "p_dx"), f"*{operands}")
    kinds |= dict.fromkeys(("p_offsets", "p_first", "p_owner"), "*i32")
    kinds |= {"p_dv": "*fp32", **dict.fromkeys(("count", "chunks", "shares"), "i32")}
    optional = dict.fromkeys(("p_tail", "p_dafter", "p_dtail"), "*fp32")
    optional |= dict.fromkeys(("p_lead", "p_last"), "*i32")
    kinds |= optional if extras else {}
    constants: dict[str, Any] = {**sizes, "BT": setting.tokens, "TILES": setting.tiles}
    constants |= {"FLOOR": FEATURE_FLOOR, "UP": not narrow}
    constants |= {} if extras else dict.fromkeys(optional)
    title = f"{operands} d={width}{' with all' if extras else ''}"
    stepped = (programs.forward, programs.to_logits, programs.to_inputs, programs.to_lagged)
    return tuple(
        Build(
            name=f"conv_feature {program.__name__} {title}",
            program=program,
            types={n: kinds[n] for n in program.arg_names if n in kinds},
            constants={n: constants[n] for n in program.arg_names if n in constants},
            warps=setting.warps,
            stages=setting.stages,
            tensor_cores=narrow,
        )
        for program in stepped
    )


def _carried_build() -> Build:
    whole = dict.fromkeys(("p_offsets", "p_lead", "p_last"), "*i32")
    return Build(
        name="conv_feature carried",
        program=programs.carried,
        types={"p_x": "*bf16", "p_tail": "*fp32", "p_after": "*fp32", **whole},
        constants={"H": 9, "D": 64, "K": 4, "BT": 4, "BD": 64},
        warps=1,
        tensor_cores=False,
    )


def _lagged(taps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """V, the matrices behind each lag: fp32 `[K, H, d, f]`, lag 0 first."""
    columns = widened(taps).reshape(*weight.shape[:2], -1).permute(2, 0, 1).flip(0)
    lagged: torch.Tensor = columns[..., None] * widened(weight)
    return lagged


def _plan(
    x: torch.Tensor,
    taps: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> _Plan:
    lead = last = None
    if mask is not None:
        time, valid = x.shape[1], (mask != 0).to(torch.int32)
        steps = torch.arange(1, time + 1, dtype=torch.int32, device=x.device)
        lead = time - (valid * steps.flip(0)).amax(dim=1)
        last = (valid * steps).amax(dim=1)
    narrow = in_bf16(x)
    setting, sizes = _sizes(x.shape[2], x.shape[3], weight.shape[2], taps.shape[1], narrow)
    return _Plan(
        sequences=Sequences.of(x, cu_seqlens),
        lead=lead,
        last=last,
        setting=setting,
        sizes=sizes,
        operands=torch.bfloat16 if narrow and not interpreted() else torch.float32,
    )


def _sizes(
    heads: int, width: int, features: int, taps: int, narrow: bool
) -> tuple[Setting, dict[str, int]]:
    columns = block_of(features)
    setting = SETTINGS[max(32, columns), narrow]
    blocks = {"BD": min(setting.inputs, block_of(width)), "BF": columns}
    return setting, {"H": heads, "D": width, "F": features, "K": taps, **blocks}


class _ConvFeature(torch.autograd.Function):
    """In terms of V and of tails `[N, K - 1, C]`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lagged: torch.Tensor,
        history: torch.Tensor | None,
        plan: _Plan,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        v = lagged.to(plan.operands).contiguous()
        ctx.save_for_backward(x, v, history)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return _features(x, v, history, plan, dtype), _after(x, history, plan)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dphi: torch.Tensor | None, dafter: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, v, history = ctx.saved_tensors
        for_x, for_v, for_history, *_ = ctx.needs_input_grad
        if dphi is None:
            dphi = x.new_zeros(*x.shape[:3], 2 * v.shape[3])
        du = _to_logits(x, v, history, dphi, ctx.plan)
        dx = torch.empty_like(x) if for_x else None
        dhistory = torch.empty_like(history) if for_history else None
        if for_x or for_history:
            _to_inputs(du, v, dafter, dx, dhistory, ctx.plan)
        dv = _to_lagged(x, history, du, ctx.plan) if for_v else None
        return dx, dv, dhistory, None, None


def _features(
    x: torch.Tensor,
    v: torch.Tensor,
    history: torch.Tensor | None,
    plan: _Plan,
    dtype: torch.dtype,
) -> torch.Tensor:
    first, owner = plan.sequences.chunks(plan.setting.tokens)
    phi = x.new_empty(*x.shape[:3], 2 * v.shape[3], dtype=dtype)
    launch(
        programs.forward, (len(owner), x.shape[2]),
        x, _some(history), v, *plan.bounds, first, owner, phi, len(plan.sequences),
        FLOOR=FEATURE_FLOOR, **plan.constants,
    )  # fmt: skip
    return phi


def _after(x: torch.Tensor, history: torch.Tensor | None, plan: _Plan) -> torch.Tensor:
    """The last inputs of each sequence, `[N, K - 1, C]`."""
    heads, width, before = x.shape[2], x.shape[3], plan.sizes["K"] - 1
    dtype = x.dtype if history is None else torch.promote_types(x.dtype, history.dtype)
    after = x.new_empty(len(plan.sequences), before, heads * width, dtype=dtype)
    if after.numel():
        sizes = {name: plan.sizes[name] for name in ("H", "D", "K", "BD")}
        launch(
            programs.carried, (len(plan.sequences), heads, triton.cdiv(width, sizes["BD"])),
            x, history, *plan.bounds, after,
            BT=int(triton.next_power_of_2(before)), num_warps=1, **sizes,
        )  # fmt: skip
    return after


def _to_logits(
    x: torch.Tensor,
    v: torch.Tensor,
    history: torch.Tensor | None,
    dphi: torch.Tensor,
    plan: _Plan,
) -> torch.Tensor:
    """The gradient of u, `[B, T, H, f]`, in the dtype that products take."""
    first, owner = plan.sequences.chunks(plan.setting.tokens)
    du = x.new_empty(*x.shape[:3], v.shape[3], dtype=plan.operands)
    launch(
        programs.to_logits, (len(owner), x.shape[2]),
        x, _some(history), v, *plan.bounds, first, owner,
        dphi.contiguous(), du, len(plan.sequences), FLOOR=FEATURE_FLOOR, **plan.constants,
    )  # fmt: skip
    return du


def _to_inputs(
    du: torch.Tensor,
    v: torch.Tensor,
    dafter: torch.Tensor | None,
    dx: torch.Tensor | None,
    dhistory: torch.Tensor | None,
    plan: _Plan,
) -> None:
    """Fill the gradients of x and of what came before it."""
    first, owner = plan.sequences.chunks(plan.setting.tokens, before=len(v) - 1)
    blocks = triton.cdiv(v.shape[2], plan.sizes["BD"])
    launch(
        programs.to_inputs, (len(owner), du.shape[2], blocks),
        du, v, *plan.bounds, first, owner,
        _some(dafter), dx, _some(dhistory), len(plan.sequences), **plan.constants,
    )  # fmt: skip


def _to_lagged(
    x: torch.Tensor, history: torch.Tensor | None, du: torch.Tensor, plan: _Plan
) -> torch.Tensor:
    """The gradient of V, fp32 `[K, H, d, f]`."""
    setting, taps = plan.setting, plan.sizes["K"]
    first, owner = plan.sequences.chunks(setting.tokens * setting.tiles)
    # A share is as large as V: short sequences have one together.
    count = min(len(owner), triton.cdiv(2 * plan.sequences.tokens, setting.tokens * setting.tiles))
    shares = x.new_empty(count, taps, *x.shape[2:], du.shape[3], dtype=torch.float32)
    launch(
        programs.to_lagged, (count * taps, x.shape[2], triton.cdiv(x.shape[3], plan.sizes["BD"])),
        x, _some(history), du, *plan.bounds, first, owner, shares,
        len(plan.sequences), len(owner), count, TILES=setting.tiles, **plan.constants,
    )  # fmt: skip
    return shares.sum(0)


def _some(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """None for a tensor without elements, which has no address."""
    return tensor.contiguous() if tensor is not None and tensor.numel() else None
