"""Where a figure was measured: processor, accelerator, package versions."""

import os
import platform
from dataclasses import dataclass
from importlib import metadata

import edgekit
from edgekit.eval.reader import Reader
from edgekit.targets import cpu_facts

__all__ = ["Machine", "this_machine"]

PACKAGES = {"torch": "torch", "openvino": "openvino", "onnx": "onnxruntime"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Hardware and versions.

    Attributes:
        cpu: the processor's name.
        cpu_count: processors that the system shows.
        device: where the model ran: the accelerator's name, or the engine's device.
        versions: by package: edgekit, Python and the engine.
    """

    cpu: str
    cpu_count: int
    device: str
    versions: dict[str, str]


def this_machine(reader: Reader) -> Machine:
    """Hardware and versions that `reader` runs on."""
    package = PACKAGES[reader.engine]
    return Machine(
        cpu=cpu_facts().get("model name") or platform.processor() or platform.machine(),
        cpu_count=os.cpu_count() or 1,
        device=_device_name(reader),
        versions={
            "edgekit": edgekit.__version__,
            "python": platform.python_version(),
            package: metadata.version(package),
        },
    )


def _device_name(reader: Reader) -> str:
    if reader.engine != "torch" or not reader.device.startswith("cuda"):
        return reader.device
    import torch

    return torch.cuda.get_device_name(reader.device)
