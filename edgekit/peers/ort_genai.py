"""`onnxruntime_genai` on a directory with genai_config.json."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai

from edgekit.peers.report import Setup
from edgekit.peers.worker import Request, agreeing, serve
from edgekit.runtime.engine import Integers


class OrtGenai:
    """One generator that is read on in and rewound; a recurrent model refuses the latter."""

    def __init__(self, request: Request) -> None:
        config = onnxruntime_genai.Config(request.model)
        if request.threads is not None:
            options = {"intra_op_num_threads": request.threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        trained = _trained_context(Path(request.model))
        longest = max(request.positions(row) for row in request.rows())
        context = min(longest, trained or longest)
        self.setup = Setup(
            threads=request.threads,
            context=context,
            trained_context=trained,
            settings={"max_length": str(context)},
        )
        params = onnxruntime_genai.GeneratorParams(self._model)
        # The shortest length keeps it from ending the text, after which it would not go on.
        params.set_search_options(
            do_sample=False, num_beams=1, max_length=context, min_length=context
        )
        self._generator = onnxruntime_genai.Generator(self._model, params)

    def encode(self, text: str) -> Sequence[int]:
        """Token ids by the tokenizer of the directory."""
        ids: list[int] = onnxruntime_genai.Tokenizer(self._model).encode(text).tolist()
        return ids

    def prefill(self, ids: Integers) -> tuple[float, float]:
        """Read the whole prompt in one call, unless genai_config.json sets a chunk size."""
        self._generator.rewind_to(0)
        start = time.perf_counter()
        self._append(ids)
        read = time.perf_counter() - start
        self._generator.generate_next_token()
        return read, time.perf_counter() - start

    def decode(self, ids: Integers, count: int) -> Sequence[float]:
        """Read on or rewind, so that the last token's logits are there; choosing counts."""
        known = self._generator.get_sequence(0)
        kept = agreeing(known, ids[:-1])
        self._generator.rewind_to(kept)
        self._append(ids[kept:])
        self._generator.generate_next_token()  # chooses from logits that are there already
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._generator.generate_next_token()
            times.append(time.perf_counter() - start)
        return times

    def _append(self, ids: Integers) -> None:
        self._generator.append_tokens(ids.astype(np.int32))


def _trained_context(directory: Path) -> int | None:
    text = (directory / "genai_config.json").read_text(encoding="utf-8")
    length: int | None = json.loads(text)["model"].get("context_length")
    return length


if __name__ == "__main__":
    serve(OrtGenai)
