"""The decoder with an adapter in it, as PEFT and transformers' Trainer take it.

The module names are those of a Hugging Face checkpoint, so what PEFT saves here opens on the model
of transformers too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig

from edgekit.adapters.aflora import AFLoraConfig
from edgekit.adapters.plan import FreezePlan
from edgekit.adapters.tune.recipe import Recipe
from edgekit.data.batch import IGNORE
from edgekit.errors import UsageError
from edgekit.kernels.kl_loss import vocabulary_loss
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder
from edgekit.models.precision import Precision, narrow_frozen
from edgekit.models.weights import WeightStore
from edgekit.sources import Source, open_source
from edgekit.sources.student import Student, ancestor, apply_student, open_model, read_student

__all__ = ["Base", "Tuned", "load_tuned", "new_tuned", "open_base"]

ADAPTER = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """What an adapter is trained on.

    Attributes:
        source: the model, or the student's teacher.
        config: of the decoder.
        weights: of the decoder.
        student: that was distilled first; None: the model as it is.
    """

    source: Source
    config: DecoderConfig
    weights: WeightStore
    student: Student | None

    @property
    def name(self) -> str:
        """What `adapter_config.json` calls it: a Hub id where there is one."""
        found = self.source.identity["name"] if self.student is None else self.student.manifest.name
        return str(found)

    @property
    def student_record(self) -> dict[str, Any] | None:
        """How the student was made, JSON-ready."""
        if self.student is None:
            return None
        return ancestor(self.student.manifest) | {"mixers": list(self.student.manifest.mixers)}


def open_base(spec: str | Path, student: str | Path | None = None) -> Base:
    """Open what is to be tuned.

    Args:
        spec: a model, as for `open_source`, or a student.
        student: the student of the model `spec`.

    Raises:
        SourceError: if something is missing or damaged, or the student is of another model.
        UsageError: if `spec` is a student whose teacher cannot be found by its name.
    """
    if student is not None:
        source, found = open_source(spec), read_student(student)
        config, weights = apply_student(source, found)
        return Base(source=source, config=config, weights=weights, student=found)
    try:
        source, config, weights = open_model(spec)
    except UsageError as cause:
        raise UsageError(
            f"{spec}: its teacher cannot be found by its name; give the teacher as SOURCE, and "
            f"--student {spec}"
        ) from cause
    plain = set(config.mixers) == {"softmax"}
    opened = None if plain else read_student(spec)
    return Base(source=source, config=config, weights=weights, student=opened)


class Tuned(PeftModel):
    """A frozen `Decoder` with one adapter; calling it gives the loss that it is trained on."""

    config = None  # the Trainer would write into the decoder's, which is frozen

    def __init__(self, decoder: Decoder, adapter: PeftConfig, precision: Precision) -> None:
        """Put a fresh adapter into `decoder`, whose tensors are never trained."""
        super().__init__(decoder, adapter, ADAPTER)
        self.precision = precision

    @property
    def decoder(self) -> Decoder:
        """The model, adapter included."""
        return cast(Decoder, self.get_base_model())

    def forward(
        self, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Summed cross-entropy, in nats; logits exist only where there is something to predict.

        Args:
            ids: token ids `[B, T]`.
            labels: what follows each of them, or `IGNORE`; `[B, T]`.
            mask: 1 for tokens, 0 for padding at a row's end, `[B, T]`; None: no padding.
        """
        decoder, chosen = self.decoder, labels != IGNORE
        with self.autocast():
            hidden, _ = decoder.hidden(ids, mask=mask)
            loss, _ = vocabulary_loss(hidden[chosen], decoder.lm_head.weight, labels[chosen])
        return loss

    def autocast(self) -> torch.autocast:
        """Enters the precision of matrix products."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.decoder.model.embed_tokens.weight.device


def new_tuned(base: Base, plan: Recipe, precision: Precision) -> Tuned:
    """The base with a fresh adapter, which changes nothing yet.

    Raises:
        UsageError: for a layer that the base lacks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return Tuned(_frozen(base, precision), _adapter(plan, base), precision)


def load_tuned(base: Base, directory: Path, precision: Precision) -> Tuned:
    """The base with the adapter that was saved in `directory`."""
    adapter = PeftConfig.from_pretrained(str(directory))
    model = Tuned(_frozen(base, precision), adapter, precision)
    model.load_adapter(str(directory), ADAPTER)
    return model.eval()


def _frozen(base: Base, precision: Precision) -> Decoder:
    decoder = Decoder.from_store(base.config, base.weights).requires_grad_(False)
    if precision == "bf16":
        narrow_frozen(decoder)
    return decoder


def _adapter(plan: Recipe, base: Base) -> PeftConfig:
    common: dict[str, Any] = {
        "r": plan.rank,
        "target_modules": plan.modules(base.config.num_layers),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
    }
    if plan.method == "lora":
        alpha = plan.rank if plan.alpha is None else plan.alpha
        return LoraConfig(lora_alpha=alpha, lora_dropout=plan.dropout, **common)  # type: ignore[arg-type]
    if plan.method == "vera":
        return VeraConfig(projection_prng_key=plan.seed, vera_dropout=plan.dropout, **common)
    freeze = plan.plan or FreezePlan(schedule="never")
    return AFLoraConfig(
        aflora_alpha=plan.alpha,
        aflora_dropout=plan.dropout,
        frozen_at_init="none",  # `FreezePlan.at_start` says it
        beta1=freeze.beta1,
        beta2=freeze.beta2,
        t_init=freeze.t_init,
        t_final=freeze.t_final,
        delta_t=freeze.interval,
        schedule=freeze.schedule,
        power=freeze.power,
        rule=freeze.rule,
        score_cadence=freeze.cadence,
        granularity=freeze.granularity,
        **common,
    )
