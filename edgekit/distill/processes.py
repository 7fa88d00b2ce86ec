"""Where training runs: device, precision, and the processes that share a step."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator

from edgekit.allocator import keep_freed_memory
from edgekit.errors import UsageError
from edgekit.models.precision import Precision

__all__ = ["Processes"]


class Processes:
    """The processes of one run, started by `accelerate launch`, torchrun, or alone.

    Every process holds all that is trained and reads its rows of each step; gradients are summed
    once a step in one flat tensor, since what is trained is a small part of the model. What is
    frozen is whole in each too, or spread over them (`sharding`).
    """

    def __init__(self, precision: Precision, *, cpu: bool = False, shard: bool = False) -> None:
        """Join the group that the launcher describes in the environment.

        Args:
            precision: of matrix products; parameters stay fp32.
            cpu: use the CPU where there is a GPU too.
            shard: spread the frozen matrices; of no effect in a process alone.
        """
        # Without this, accelerate overlooks the launcher on a machine that has no GPU.
        self._accelerator = Accelerator(cpu=cpu or not torch.accelerator.is_available())
        self.precision, self._shard = precision, shard
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def device(self) -> torch.device:
        """Of this process."""
        device: torch.device = self._accelerator.device
        return device

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return int(self._accelerator.process_index)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._accelerator.num_processes)

    @property
    def shards(self) -> bool:
        """Whether the frozen matrices are spread over the processes."""
        return self._shard and self.count > 1

    @property
    def description(self) -> str:
        """Device, precision and processes, for records."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"CPU, {torch.get_num_threads()} threads"
        shared = f", {self.count} processes" if self.count > 1 else ""
        sharded = ", frozen weights sharded" if self.shards else ""
        return f"{name}, {self.precision}{shared}{sharded}"

    def autocast(self) -> AbstractContextManager[object]:
        """Enters the precision of matrix products."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def share(self, rows: int) -> tuple[int, int]:
        """This process's part of `rows`: first and one after the last.

        Raises:
            UsageError: if they cannot be shared out evenly.
        """
        if rows % self.count:
            raise UsageError(f"batch {rows} given; allowed: a multiple of {self.count} processes")
        each = rows // self.count
        return self.rank * each, (self.rank + 1) * each

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all processes, on its own device."""
        if self.count == 1:
            return tensor
        total: torch.Tensor = self._accelerator.reduce(tensor.to(self.device), reduction="sum")
        return total.to(tensor.device)

    def add_up_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes."""
        if self.count == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.add_up(torch.cat([g.flatten() for g in grads]))
        for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()
