"""A student beside its teacher in memory: what is frozen exists once."""

from collections.abc import Mapping

import torch

from edgekit.distill.recipe import Recipe
from edgekit.errors import UsageError
from edgekit.mixers.base import mixer_type
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import Decoder

__all__ = ["student_config", "student_over"]


def student_config(teacher: DecoderConfig, recipe: Recipe) -> DecoderConfig:
    """The teacher's configuration with the recipe's mixers.

    Raises:
        UsageError: for a layer that the teacher lacks, or when no layer is left to convert.
    """
    outside = [i for i in recipe.softmax_layers if not 0 <= i < teacher.num_layers]
    if outside:
        raise UsageError(
            f"softmax layer {outside[0]} given; allowed: 0 to {teacher.num_layers - 1}"
        )
    if recipe.mixer == "softmax" or len(set(recipe.softmax_layers)) == teacher.num_layers:
        raise UsageError("every layer would keep softmax attention: nothing to distil")
    mixers = tuple(
        "softmax" if i in recipe.softmax_layers else recipe.mixer for i in range(teacher.num_layers)
    )
    return teacher.with_mixers(mixers, lawcat=recipe.lawcat, lolcats=recipe.lolcats)


def student_over(
    teacher: Decoder, config: DecoderConfig, trained: Mapping[str, torch.Tensor] | None = None
) -> Decoder:
    """A student that shares the storage of every tensor the teacher has.

    Args:
        teacher: on the device of training.
        config: the student's.
        trained: mixer tensors of an earlier student by their names in the decoder; the others
            start fresh.
    """
    with torch.device("meta"):
        student = Decoder(config)
    device = teacher.model.embed_tokens.weight.device
    tensors = dict(teacher.state_dict())
    for layer, mixer in enumerate(config.mixers):
        for name, fresh in mixer_type(mixer).fresh_tensors(config, layer).items():
            full = f"model.layers.{layer}.self_attn.{name}"
            given = fresh if trained is None else trained.get(full, fresh)
            tensors[full] = given.float().to(device, copy=True)
    student.load_state_dict(tensors, strict=True, assign=True)
    return student.eval()
