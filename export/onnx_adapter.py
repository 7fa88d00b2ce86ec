"""An adapter as a `.onnx_adapter` file, for ONNX Runtime's LoraAdapter and onnxruntime-genai."""

from pathlib import Path

import numpy as np

from edgekit.bundle import read_manifest
from edgekit.errors import EngineError, UsageError
from edgekit.runtime.adapter_file import read_adapter
from edgekit.runtime.adapters import matched_pairs

__all__ = ["write_onnx_adapter"]

ENDING = ".onnx_adapter"


def write_onnx_adapter(
    bundle: Path | str, adapter: Path | str, out: Path | str, *, weight: float = 1.0
) -> int:
    """Write the file for a bundle with adapter slots; two such files do not add up when active.

    Args:
        bundle: the bundle that will use it.
        adapter: a directory that PEFT's `save_pretrained` wrote.
        out: the file, ending in `.onnx_adapter`.
        weight: of the adapter, folded into B.

    Returns:
        The number of modules in it.

    Raises:
        AdapterError: if the adapter cannot be read, or nothing of it fits the bundle.
        BundleError: if the bundle is none.
        EngineError: if the bundle has no ONNX graph.
        UsageError: if the file cannot be written.
    """
    import onnxruntime

    manifest = read_manifest(bundle)
    if "onnx" not in manifest.engines:
        raise EngineError(f"{bundle}: has no ONNX graph; convert again with --format onnx")
    if Path(out).suffix != ENDING:
        raise UsageError(f"{out}: allowed: a file name that ends in {ENDING}")
    pairs, _ = matched_pairs(read_adapter(adapter), manifest.adapter_slots)
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    parameters = {}
    for module, pair in pairs.items():
        parameters[f"{module}.lora_A"] = make(np.ascontiguousarray(pair.a.T))
        parameters[f"{module}.lora_B"] = make(np.ascontiguousarray(np.float32(weight) * pair.b.T))
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters(parameters)
    try:
        form.export_adapter(str(out))
    except RuntimeError as cause:
        raise UsageError(f"{out}: cannot be written ({cause})") from cause
    if not Path(out).is_file():
        raise UsageError(f"{out}: cannot be written")
    return len(pairs)
