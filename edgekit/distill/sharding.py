"""The frozen matrices of teacher and student spread over all processes (PyTorch's FSDP).

What is trained is small and stays whole in every process, so gradients are summed as without it;
each frozen matrix is gathered where it multiplies, forwards and backwards, and let go.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from edgekit.models.decoder import Decoder

__all__ = ["place_unsharded", "shard_frozen"]


def place_unsharded(teacher: Decoder, device: torch.device) -> None:
    """Move what `shard_frozen` leaves whole; of the rest only a part will ever be there."""
    spread = {id(linear.weight) for _, linear in _frozen_linears(teacher)}
    for parameter in teacher.parameters():
        if id(parameter) not in spread:
            parameter.data = parameter.data.to(device)
    for buffer in teacher.buffers():
        buffer.data = buffer.data.to(device)


def shard_frozen(teacher: Decoder, student: Decoder, device: torch.device, processes: int) -> None:
    """Keep one part of each frozen matrix in each process, for teacher and student together.

    Args:
        teacher: in place.
        student: over this teacher, before its pairs are injected; it takes the teacher's linears
            for its own.
        device: of training.
        processes: how many share each matrix.
    """
    mesh = init_device_mesh(device.type, (processes,))
    for name, linear in _frozen_linears(teacher):
        linear.requires_grad_(False)
        fully_shard(linear, mesh=mesh, reshard_after_forward=True)
        parent, _, child = name.rpartition(".")
        setattr(student.get_submodule(parent), child, linear)


def _frozen_linears(teacher: Decoder) -> Iterator[tuple[str, nn.Linear]]:
    """Linears of the layers by name; a teacher has no others there."""
    for name, module in teacher.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model.layers."):
            yield name, module
