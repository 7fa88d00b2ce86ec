"""`openvino_genai.LLMPipeline` on an export: a directory with openvino_model.xml and tokenizer.

The pipeline keeps what it has read of earlier prompts and reads only what is new of the next one.
That is welcome before decoding, and would falsify the reading of a prompt; so each prompt that is
timed begins with another token.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai

from edgekit.peers.report import Setup
from edgekit.peers.worker import Request, serve
from edgekit.runtime.engine import Integers

# What edgekit asks for too; left alone it takes bf16 where the CPU has it.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}
MICROSECONDS = 1e-6


class OpenVinoGenai:
    """Whole generations; the times are those of its own `PerfMetrics`, sampling included."""

    def __init__(self, request: Request) -> None:
        self.setup = Setup(
            threads=request.threads,
            context=None,
            trained_context=_trained_context(Path(request.model)),
            settings=PRECISION,
        )
        properties: dict[str, Any] = dict(PRECISION)
        if request.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = request.threads
        self._pipeline = openvino_genai.LLMPipeline(request.model, "CPU", **properties)
        self._other = itertools.count()

    def encode(self, text: str) -> Sequence[int]:
        """Token ids by the tokenizer of the export."""
        encoded = self._pipeline.get_tokenizer().encode(text, add_special_tokens=False)
        ids: list[int] = encoded.input_ids.data.reshape(-1).tolist()
        return ids

    def prefill(self, ids: Integers) -> tuple[float, float]:
        """Read a prompt that it has not seen."""
        unseen = ids.copy()
        unseen[0] = next(self._other)
        raw = self._generate(unseen, 1)
        read, first = raw.token_infer_durations[0], raw.m_times_to_first_token[0]
        return MICROSECONDS * read, MICROSECONDS * first

    def decode(self, ids: Integers, count: int) -> Sequence[float]:
        """The time from token to token; the first one belongs to the reading."""
        raw = self._generate(ids, count + 1)
        return [MICROSECONDS * duration for duration in raw.m_durations]

    def _generate(self, ids: Integers, count: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        row = ids[None]
        given = openvino_genai.TokenizedInputs(ov.Tensor(row), ov.Tensor(np.ones_like(row)))
        return self._pipeline.generate(given, config).perf_metrics.raw_metrics


def _trained_context(directory: Path) -> int | None:
    file = directory / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    length: int | None = facts.get("max_position_embeddings")
    return length


if __name__ == "__main__":
    serve(OpenVinoGenai)
