"""llama.cpp, through the package llama-cpp-python and with its defaults: a mapped GGUF file."""

import time
from collections.abc import Sequence

import llama_cpp
import numpy as np

from edgekit.peers.cpus import usable_threads
from edgekit.peers.report import Setup
from edgekit.peers.worker import Request, agreeing, serve
from edgekit.runtime.engine import Integers

BATCH = 512  # its default for reading


class LlamaCpp:
    """One context that is read on in and cut back: `eval` drops what lies beyond `n_tokens`."""

    def __init__(self, request: Request) -> None:
        # Left alone it takes half of the machine's CPUs, whatever this process may use.
        threads = usable_threads(request.threads)
        self._llama = _loaded(request, threads)
        context = len(self._llama.input_ids)
        self.setup = Setup(
            threads=threads,
            context=context,
            trained_context=llama_cpp.llama_model_n_ctx_train(self._llama.model),
            settings={"n_ctx": str(context), "n_batch": str(BATCH)},
        )

    def encode(self, text: str) -> Sequence[int]:
        """Token ids, without the one that begins a text."""
        return list(self._llama.tokenize(text.encode(), add_bos=False))

    def prefill(self, ids: Integers) -> tuple[float, float]:
        """Read in batches, as llama.cpp does by itself."""
        self._llama.n_tokens = 0
        start = time.perf_counter()
        self._llama.eval(ids.tolist())
        read = time.perf_counter() - start
        self._greedy()
        return read, time.perf_counter() - start

    def decode(self, ids: Integers, count: int) -> Sequence[float]:
        """Read on or cut back, so that the last token's logits are there; argmax does not count."""
        known = self._llama.input_ids[: self._llama.n_tokens].astype(np.int64)
        self._llama.n_tokens = agreeing(known, ids[:-1])
        self._llama.eval(ids[self._llama.n_tokens :].tolist())
        times = []
        for _ in range(count):
            token = self._greedy()
            start = time.perf_counter()
            self._llama.eval([token])
            times.append(time.perf_counter() - start)
        return times

    def _greedy(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())


def _loaded(request: Request, threads: int) -> llama_cpp.Llama:
    """The model with a context for the longest row whose cache can be had.

    Raises:
        ValueError: if there is none.
    """
    sizes = sorted({request.positions(row) for row in request.rows()})
    while True:
        try:
            return llama_cpp.Llama(
                request.model,
                n_ctx=sizes.pop(),
                n_batch=BATCH,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=False,
                verbose=False,
            )
        except ValueError:
            if not sizes:
                raise


if __name__ == "__main__":
    serve(LlamaCpp)
