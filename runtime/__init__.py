"""Run a bundle on a device: numpy, a tokenizer and one engine; no torch.

Example (SmolLM2-135M-Instruct, all softmax, int4; with LAWCAT the state's bytes never change):
    >>> from edgekit.runtime import load                                       # doctest: +SKIP
    >>> model = load("smollm2", engine="onnx")                                 # doctest: +SKIP
    >>> question = [{"role": "user", "content": "What is the capital of France?"}]
    >>> model.generate(model.chat_prompt(question), max_new_tokens=16)         # doctest: +SKIP
    'The capital of France is Paris, France.'
    >>> session = model.session()                                              # doctest: +SKIP
    >>> session.append(model.tokenizer.encode("Hello")).shape                  # doctest: +SKIP
    (1, 49152)
    >>> session.position, session.state_bytes                                  # doctest: +SKIP
    (1, 46080)
"""

from edgekit.runtime.adapters import AdapterInfo
from edgekit.runtime.generation import GenerationStats, ScoredPiece
from edgekit.runtime.loading import load
from edgekit.runtime.model import Model
from edgekit.runtime.sampling import GenerationOptions
from edgekit.runtime.session import Session
from edgekit.runtime.state import Snapshot

__all__ = [
    "AdapterInfo",
    "GenerationOptions",
    "GenerationStats",
    "Model",
    "ScoredPiece",
    "Session",
    "Snapshot",
    "load",
]
