"""Which peers there are, what each needs installed, and which model it reads."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EngineError, UsageError

__all__ = ["PEERS", "Package", "check_installed", "model_files"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A toolkit.

    Attributes:
        runner: our module that measures it, run with `python -m`.
        module: what it is imported as.
        distributions: what pip calls it, and what its speed depends on besides.
        reads: what a model is, in words.
        marker: a file that a model's directory has; None: the model is one file.
        weights: the files of the directory that hold graph and weights, as a pattern.
    """

    runner: str
    module: str
    distributions: tuple[str, ...]
    reads: str
    marker: str | None = None
    weights: str = ""


PEERS = {
    "llama-cpp": Package(
        runner="edgekit.peers.llama_cpp",
        module="llama_cpp",
        distributions=("llama-cpp-python",),
        reads="a .gguf file",
    ),
    "openvino-genai": Package(
        runner="edgekit.peers.openvino_genai",
        module="openvino_genai",
        distributions=("openvino-genai", "openvino"),
        reads="a directory with openvino_model.xml and tokenizer",
        marker="openvino_model.xml",
        weights="openvino_model.*",
    ),
    "ort-genai": Package(
        runner="edgekit.peers.ort_genai",
        module="onnxruntime_genai",
        distributions=("onnxruntime-genai", "onnxruntime"),
        reads="a directory with genai_config.json",
        marker="genai_config.json",
        weights="*.onnx*",
    ),
}


def check_installed(name: str) -> Package:
    """The peer `name`.

    Raises:
        UsageError: if there is no such peer.
        EngineError: if its package is not installed; says how to install it.
    """
    if name not in PEERS:
        raise UsageError(f"peer {name!r} given; allowed: {', '.join(PEERS)}")
    package = PEERS[name]
    if importlib.util.find_spec(package.module) is None:
        raise EngineError(
            f"peer {name}: not installed; install it with: pip install {package.distributions[0]}"
        )
    return package


def model_files(name: str, model: Path) -> list[Path]:
    """The files of `model` that hold graph and weights.

    Raises:
        UsageError: if `model` is not what the peer `name` reads.
    """
    package = PEERS[name]
    if package.marker is None:
        files = [model] if model.is_file() and model.suffix.lower() == ".gguf" else []
    else:
        files = sorted(model.glob(package.weights)) if (model / package.marker).is_file() else []
    if not files:
        raise UsageError(f"peer {name}: {model} given; allowed: {package.reads}")
    return files
