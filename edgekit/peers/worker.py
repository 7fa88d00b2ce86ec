"""The far end of `measuring.py`: one peer in a process of its own, with a request in its argument.

It answers in lines of JSON with one key each: `load_ms` and `setup`; then for each row `step`, and
`prefill`, `decode` or `missing`; in the end `peak_rss`. A mark before each tells it from what the
toolkit itself may print.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from edgekit import config
from edgekit.peers.report import Missing, Setup
from edgekit.runtime.engine import Integers
from edgekit.runtime.latency import Prefill, Steps
from edgekit.runtime.memory import status_bytes
from edgekit.runtime.workload import TEXT

__all__ = ["MARK", "Peer", "Request", "agreeing", "serve"]

MARK = "\x1e"  # record separator, as before the records of a JSON text sequence
FAILURES = (MemoryError, RuntimeError, ValueError)  # what the toolkits raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to measure, as in `edgekit.runtime.workload.Options`, and of which model."""

    model: str
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    tokens: int
    repeat: int
    threads: int | None

    def rows(self) -> list[Missing]:
        """Every row in order, as long as it is missing."""
        prompts = [Missing(row="prompt", tokens=length, note="") for length in self.prompts]
        return prompts + [Missing(row="depth", tokens=depth, note="") for depth in self.depths]

    def positions(self, row: Missing) -> int:
        """How many tokens a row holds in the end, the last one written included."""
        return row.tokens + 1 if row.row == "prompt" else max(row.tokens, 1) + self.tokens + 1


class Peer(Protocol):
    """A toolkit with its model loaded."""

    setup: Setup

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of `text`, with none added."""

    def prefill(self, ids: Integers) -> tuple[float, float]:
        """Read `ids [T]` from nothing: seconds until they are read, and until a token is known."""

    def decode(self, ids: Integers, count: int) -> Sequence[float]:
        """Seconds of each of `count` greedy steps after `ids [T]`, whose reading does not count."""


def serve(open_peer: Callable[[Request], Peer]) -> None:
    """The main of a peer's module; a model that cannot be loaded is one line on stderr."""
    request = config.load(Request, json.loads(sys.argv[1]), where="request")
    started = time.perf_counter()
    try:
        peer = open_peer(request)
    except FAILURES as failure:
        sys.exit(_line(failure))
    _say("load_ms", 1e3 * (time.perf_counter() - started))
    _say("setup", peer.setup)
    ids = np.array(peer.encode(TEXT), dtype=np.int64)
    for row in request.rows():
        _say("step", f"{row.row} of {row.tokens} tokens")
        _say(*_measured(peer, ids, row, request))
    peak = status_bytes("VmHWM")
    if peak is not None:
        _say("peak_rss", peak)


def agreeing(known: Integers, ids: Integers) -> int:
    """How many tokens at the start of `ids [T]` are those of `known [U]`."""
    shorter = min(len(known), len(ids))
    other = np.flatnonzero(known[:shorter] != ids[:shorter])
    return int(other[0]) if len(other) else shorter


def _measured(
    peer: Peer, text: Integers, row: Missing, request: Request
) -> tuple[str, Prefill | Steps | Missing]:
    """One row, or why it could not be measured."""
    needed, context = request.positions(row), peer.setup.context
    if context is not None and needed > context:
        note = f"{needed} tokens do not fit in its context of {context}"
        return "missing", replace(row, note=note)
    ids = np.resize(text, max(row.tokens, 1))
    try:
        if row.row == "prompt":
            return "prefill", _prefill(peer, ids, request.repeat)
        return "decode", _decode(peer, ids, row.tokens, request)
    except FAILURES as failure:
        return "missing", replace(row, note=_line(failure))


def _prefill(peer: Peer, ids: Integers, repeat: int) -> Prefill:
    peer.prefill(ids)  # not counted
    return Prefill.of(len(ids), [peer.prefill(ids) for _ in range(repeat)])


def _decode(peer: Peer, ids: Integers, depth: int, request: Request) -> Steps:
    peer.decode(ids, request.tokens)  # not counted
    return Steps.of(depth, [peer.decode(ids, request.tokens) for _ in range(request.repeat)])


def _say(kind: str, data: Any) -> None:
    print(MARK + json.dumps({kind: config.dump(data)}), flush=True)


def _line(failure: Exception) -> str:
    return " ".join(str(failure).split()) or type(failure).__name__
