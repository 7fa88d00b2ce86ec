"""Stage 2: low-rank tuning of the projections, on the next token and on the teacher's logits.

The pairs are PEFT's LoRA (arXiv 2106.09685), injected into the student's linears, so that any PEFT
method that speaks of linears can stand in its place.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import nn

from edgekit.artefacts.lowrank import LowRank
from edgekit.distill.recipe import PROJECTIONS, Tuning
from edgekit.distill.stage import Group, TorchBatch
from edgekit.distill.transfer import new_parameters
from edgekit.errors import UsageError
from edgekit.kernels.kl_loss import IGNORE, vocabulary_loss
from edgekit.models.decoder import Decoder, step_context

__all__ = ["TuningStage", "inject_pairs", "pairs"]

ADAPTER = "default"


class TuningStage:
    """Next-token and logit-KL tuning; see `distill.stage.Stage` for what the loop asks of it."""

    number, name = 2, "tuning"

    def __init__(
        self,
        teacher: Decoder,
        student: Decoder,
        config: Tuning,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Freeze everything but the low-rank pairs and, if they have a rate, the new mixers.

        Args:
            teacher: gives the logits to match; not run where `kl_weight` is 0.
            student: with its pairs already injected (`inject_pairs`).
            config: rates and weights.
            autocast: enters the precision of matrix products.
        """
        self._teacher, self._student, self._config = teacher, student, config
        self._autocast = autocast
        student.requires_grad_(False)
        self._pairs = {n: p for n, p in student.named_parameters() if _is_pair(n)}
        self._mixers: dict[str, nn.Parameter] = {}
        for layer, mixer in enumerate(student.config.mixers):
            if mixer != "softmax":
                self._mixers |= new_parameters(student, layer)
        trained = self._pairs | (self._mixers if config.mixer_lr else {})
        for parameter in trained.values():
            parameter.requires_grad_(True)
        # Dropout of the pairs is the only module that asks whether it is being trained.
        student.train(config.dropout > 0)

    @property
    def parts(self) -> list[str]:
        """What the losses of `accumulate` belong to."""
        return ["cross-entropy", "kl"]

    def groups(self) -> list[Group]:
        """The pairs, and the mixers at their own rate."""
        found = [Group(lr=self._config.lr, parameters=list(self._pairs.values()))]
        if self._config.mixer_lr:
            mixers = list(self._mixers.values())
            found.append(Group(lr=self._config.mixer_lr, parameters=mixers))
        return found

    def clipped_together(self) -> list[list[nn.Parameter]]:
        """All as one."""
        return [[p for group in self.groups() for p in group.parameters]]

    def tensors(self) -> dict[str, nn.Parameter]:
        """Pairs and mixers by name; mixers that are frozen too, since stage 1 made them."""
        return self._pairs | self._mixers

    def buffers(self) -> dict[str, torch.Tensor]:
        """None."""
        return {}

    def prepare(self, batch: TorchBatch) -> None:
        """Nothing has to be measured."""

    def accumulate(self, batch: TorchBatch, whole: TorchBatch) -> torch.Tensor:
        """Add the gradients of `batch`'s share of the loss.

        The head runs only where there is something to learn: every token with a KL, else the
        positions that carry a label.

        Args:
            batch: some rows of a step.
            whole: the step, over all processes and micro-batches.

        Returns:
            This share of the mean cross-entropy per label and of the mean KL per position, nats.
        """
        config = self._config
        with self._autocast():
            hidden, _ = self._student.hidden(batch.given, mask=batch.mask, image=batch.image)
            chosen = self._positions(batch)
            expected = self._teacher_hidden(batch, chosen) if config.kl_weight else None
            ce, kl = vocabulary_loss(
                hidden[chosen],
                self._student.lm_head.weight,
                batch.targets[chosen],
                expected,
                temperature=config.temperature,
            )
        shares = torch.stack((ce / max(whole.labels, 1), kl / whole.positions))
        weights = shares.new_tensor((config.ce_weight, config.kl_weight))
        (shares * weights).sum().backward()  # type: ignore[no-untyped-call]
        return shares.detach().float().cpu()

    def summary(self, losses: torch.Tensor) -> dict[str, object]:
        """What a metrics record says of a step's summed losses."""
        ce, kl = losses.tolist()
        total = self._config.ce_weight * ce + self._config.kl_weight * kl
        return {"loss": total, "cross_entropy": ce, "kl": kl if self._config.kl_weight else None}

    @torch.no_grad()
    def culprit(self, batch: TorchBatch, losses: torch.Tensor) -> str:
        """The first layer whose output is not finite, else whose gradient is not."""
        del losses
        time = batch.ids.shape[1]
        context = step_context(
            self._student.config, time, time, batch.mask, "chunked", batch.ids.device, batch.image
        )
        with self._autocast():
            x = batch.embeddings
            x = self._student.model.embed_tokens(batch.ids) if x is None else x
            for i, layer in enumerate(self._student.layers):
                x, _ = layer(x, context)
                if not x.isfinite().all():
                    return f"layer {i}"
        for name, parameter in self.tensors().items():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {name}"
        return "the loss over the vocabulary"

    def _positions(self, batch: TorchBatch) -> torch.Tensor:
        """Which `[N, T]` the head reads."""
        if not self._config.kl_weight:
            return batch.targets != IGNORE
        if batch.mask is None:
            return torch.ones_like(batch.ids, dtype=torch.bool)
        return batch.mask.bool()

    @torch.no_grad()
    def _teacher_hidden(self, batch: TorchBatch, chosen: torch.Tensor) -> torch.Tensor:
        hidden, _ = self._teacher.hidden(batch.given, mask=batch.mask, image=batch.image)
        return hidden[chosen]


def inject_pairs(student: Decoder, config: Tuning, given: dict[str, LowRank], seed: int) -> None:
    """Put LoRA pairs beside the student's linears, in place.

    Args:
        student: its layers that are not softmax are tuned.
        config: rank, alpha, dropout and targets.
        given: pairs of an earlier student by linear (`model.layers.0.self_attn.q_proj`), to go on
            from; a pair of smaller rank fills the first rows.
        seed: of the fresh A.

    Raises:
        UsageError: if a given pair has no place or a larger rank.
    """
    import peft

    layers = [i for i, m in enumerate(student.config.mixers) if m != "softmax"]
    names = [f"layers.{i}.{_parent(t)}.{t}" for i in layers for t in config.targets]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, student)
    for parameter_name, parameter in student.named_parameters():
        if _is_pair(parameter_name):
            parameter.data = parameter.data.float()  # whatever the frozen matrices are kept in
    for name, pair in given.items():
        if name.rpartition(".")[2] not in config.targets:
            raise UsageError(f"the earlier student tunes {name}; allowed: the recipe's targets")
        if pair.rank > config.rank:
            raise UsageError(f"the earlier student has rank {pair.rank}; give tuning.rank as much")
        _fill(student.get_submodule(name), pair)


def pairs(student: Decoder) -> dict[str, LowRank]:
    """The low-rank deltas beside the student's linears, by the linear's name, scale folded in."""
    found = {}
    for name, module in student.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            scale = module.scaling[ADAPTER]
            found[name] = LowRank(a=a.detach(), b=scale * b.detach())
    return found


def _fill(module: nn.Module, pair: LowRank) -> None:
    """Start the LoRA of `module` from `pair`."""
    layer = cast("peft.tuners.lora.Linear", module)  # type: ignore[name-defined]  # noqa: F821
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight[: pair.rank] = pair.a
        layer.lora_B[ADAPTER].weight[:, : pair.rank] = pair.b / layer.scaling[ADAPTER]


def _parent(linear: str) -> str:
    return "self_attn" if linear in PROJECTIONS else "mlp"


def _is_pair(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
