"""The settings of an AFLoRA adapter, as `adapter_config.json` keeps them."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from edgekit.adapters.plan import FreezePlan
from edgekit.errors import UsageError

__all__ = ["AFLoraConfig"]


@dataclass
class AFLoraConfig(PeftConfig):
    """AFLoRA, "Adaptive Freezing of Low Rank Adaptation" (arXiv 2403.13269).

    For each adapted map with weight W `[out, in]`, Y = X (W + s diag(b) B diag(d) A)^T.

    Args:
        r: rank.
        target_modules: names, or one regular expression; None: what the paper adapts in models of
            this type, else what PEFT adapts with LoRA.
        exclude_modules: names, or one regular expression.
        aflora_alpha: s is alpha / r; None: s = 1.
        aflora_dropout: on the input of A.
        d_initial: of the vector d.
        pm_init: bound of the uniform A and B; `kaiming` is the paper's.
        fan_in_fan_out: weights are [in, out], as transformers' Conv1D has them.
        bias: `none`; AFLoRA trains no biases.
        modules_to_save: trained and saved whole, such as a classifier.
        init_weights: False keeps A, B, d and b as random as B, for tests of merging.
        layers_to_transform: layers to adapt; None: all.
        layers_pattern: name of the module list of layers.
        rank_pattern: rank by module name or pattern.
        alpha_pattern: alpha by module name or pattern.
        frozen_at_init: projections that are never trained: `attention`, `square` (in = out, as the
            authors' code has it), `none`, or patterns of module names; None: `attention` in
            encoders, else `none`.
        t_init: see `FreezePlan`, as the following ones.
        delta_t: steps between two decisions.
        total_step: steps of training; None: the Trainer's.
        frozen_pms: parts frozen so far by module; filled in while it is trained.
        freeze_log: every freeze; filled in while it is trained.
    """

    r: int = 4
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    aflora_alpha: float | None = None
    aflora_dropout: float = 0.0
    d_initial: float = 0.1
    pm_init: float | str = "kaiming"
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float | None] = field(default_factory=dict)
    frozen_at_init: list[str] | str | None = None
    beta1: float = 0.85
    beta2: float = 0.95
    t_init: float | str = 0.1
    t_final: float | str = 0.4
    delta_t: int = 10
    schedule: str = "cubic"
    power: float = 3.0
    rule: str = "rank"
    score_cadence: str = "step"
    granularity: str = "projection"
    total_step: int | None = None
    frozen_pms: dict[str, list[str]] = field(default_factory=dict)
    freeze_log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: naming the field.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType.AFLORA  # type: ignore[attr-defined]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.r < 1:
            raise UsageError(f"r {self.r} given; allowed: 1 or more")
        if self.bias != "none":
            raise UsageError(f"bias {self.bias!r} given; allowed: 'none', AFLoRA trains no biases")
        if not 0 <= self.aflora_dropout < 1:
            raise UsageError(f"aflora_dropout {self.aflora_dropout} given; allowed: 0 up to, not 1")
        if isinstance(self.pm_init, str) and self.pm_init != "kaiming":
            raise UsageError(f"pm_init {self.pm_init!r} given; allowed: 'kaiming' or a bound")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError("layers_pattern given without layers_to_transform; give both")
        self.freeze_plan()

    def freeze_plan(self) -> FreezePlan:
        """What the freeze controller does with this adapter.

        Raises:
            UsageError: naming the field.
        """
        return FreezePlan(
            t_init=self.t_init,
            t_final=self.t_final,
            schedule=self.schedule,  # type: ignore[arg-type]
            power=self.power,
            interval=self.delta_t,
            rule=self.rule,  # type: ignore[arg-type]
            granularity=self.granularity,  # type: ignore[arg-type]
            beta1=self.beta1,
            beta2=self.beta2,
            cadence=self.score_cadence,  # type: ignore[arg-type]
        )
