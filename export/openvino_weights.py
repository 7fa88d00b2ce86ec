"""A decoder's tensors as constants of an OpenVINO graph, over the memory that they lie in."""

from typing import Any

import openvino as ov
import torch
from openvino import opset15 as op

from edgekit.models.weights import WeightStore

__all__ = ["WeightConstants"]

Handle = Any  # an openvino.Output: the package ships no types


class WeightConstants:
    """Makes constants out of a weight store; nothing is copied.

    Attributes:
        store: the tensors.
        owners: of the memory that the constants point into; keep it as long as the model.
    """

    def __init__(self, store: WeightStore, *, half: bool) -> None:
        """`half` holds large fp32 matrices in 16 bits."""
        self.store, self._half = store, half
        self.owners: list[torch.Tensor] = []
        self._matrices: dict[str, Handle] = {}

    def constant(self, tensor: torch.Tensor) -> Handle:
        """A constant over the tensor's own memory, widened to fp32 in the graph."""
        tensor = tensor.detach().contiguous()
        self.owners.append(tensor)
        if tensor.dtype == torch.bfloat16:
            raw = ov.Tensor(tensor.view(torch.uint16).numpy(), list(tensor.shape), ov.Type.bf16)
            constant = ov.op.Constant(raw, shared_memory=True)
        else:
            constant = ov.op.Constant(tensor.numpy(), shared_memory=True)
        if tensor.dtype == torch.float32:
            return constant.output(0)
        return op.convert(constant, "f32").output(0)

    def small(self, name: str) -> Handle:
        """A small tensor at full precision."""
        return self._named(self.store.tensor(name), name)

    def matrix(self, name: str) -> Handle:
        """A large matrix, in the storage format asked for; made once however often it is used."""
        if name not in self._matrices:
            tensor = self.store.tensor(name)
            narrow = self._half and tensor.dtype == torch.float32
            self._matrices[name] = self._named(tensor.half() if narrow else tensor, name)
        return self._matrices[name]

    def _named(self, tensor: torch.Tensor, name: str) -> Handle:
        handle = self.constant(tensor)
        node = handle.get_node()
        constant = node if node.get_type_name() == "Constant" else node.input_value(0).get_node()
        constant.set_friendly_name(name)
        return handle
