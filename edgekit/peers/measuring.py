"""Measure a peer: start its process, tell it what to do, and gather what it says."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from edgekit import config
from edgekit.command import last_line
from edgekit.errors import EngineError
from edgekit.peers.registry import PEERS, check_installed, model_files
from edgekit.peers.report import Missing, PeerReport, Setup
from edgekit.peers.worker import MARK, Request
from edgekit.runtime.latency import Prefill, Steps
from edgekit.runtime.workload import Options, Progress

__all__ = ["measure_peer"]

KINDS: dict[str, type] = {
    "load_ms": float,
    "setup": Setup,
    "prefill": Prefill,
    "decode": Steps,
    "missing": Missing,
    "peak_rss": int,
}


def measure_peer(
    name: str, model: str | Path, options: Options, progress: Progress | None = None
) -> PeerReport:
    """Measure a peer on this machine's CPU, in a process of its own.

    Args:
        name: one of `PEERS`.
        model: what the peer reads: a `.gguf` file, or a directory.
        options: what to measure; engine, device and adapters are a bundle's and mean nothing here.
        progress: called with a step's name, its number and the count of steps.

    Returns:
        What was measured. A row that the peer could not do is among `missing`, with the reason;
        so is every row that a process still owed when it was killed, as it is when memory runs out.

    Raises:
        UsageError: if there is no such peer, or it does not read such a model.
        EngineError: if the peer is not installed, or cannot load this very model.
    """
    check_installed(name)
    files = model_files(name, Path(model))
    request = Request(
        model=str(model),
        prompts=options.prompts,
        depths=tuple(sorted(set(options.depths))),
        tokens=options.tokens,
        repeat=options.repeat,
        threads=options.threads,
    )
    report = PeerReport(
        peer=name,
        model=Path(model).resolve().name,
        model_bytes=sum(file.stat().st_size for file in files),
        repeat=options.repeat,
        versions={package: metadata.version(package) for package in PEERS[name].distributions},
    )
    rows = request.rows()
    numbers = iter(range(len(rows)))
    with closing(_said(name, request)) as answers:  # its end is the process's
        for kind, data in answers:
            if kind == "step" and progress is not None:
                progress(f"{name}: {data}", next(numbers), len(rows))
            elif kind == "killed":
                report = replace(report, missing=(*report.missing, *_owed(report, rows, data)))
            elif kind in KINDS:
                report = _with(report, kind, data)
    return report


def _with(report: PeerReport, kind: str, data: Any) -> PeerReport:
    """The report with one more answer."""
    found: Any = config.load(KINDS[kind], data, where=report.peer)
    before = getattr(report, kind)
    changed: dict[str, Any] = {kind: (*before, found) if isinstance(before, tuple) else found}
    return replace(report, **changed)


def _owed(report: PeerReport, rows: list[Missing], number: int) -> list[Missing]:
    """The rows that a process owed when the signal of this number ended it."""
    done = {("prompt", row.tokens) for row in report.prefill}
    done |= {("depth", row.depth) for row in report.decode}
    done |= {(row.row, row.tokens) for row in report.missing}
    reason = f"its process was ended by {signal.Signals(number).name}"
    hint = "; out of memory?" if number == signal.SIGKILL else ""
    return [replace(r, note=reason + hint) for r in rows if (r.row, r.tokens) not in done]


def _said(name: str, request: Request) -> Generator[tuple[str, Any]]:
    """What the peer's process says, line by line, and `killed` with a signal if one ended it."""
    plain = json.dumps(config.dump(request))
    command = [sys.executable, "-P", "-m", PEERS[name].runner, plain]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                _, mark, answer = line.partition(MARK)
                yield from json.loads(answer).items() if mark else ()
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        if code < 0:
            yield "killed", -code
        elif code > 0:
            noise.seek(0)
            raise EngineError(f"peer {name}: {request.model}: {last_line(noise.read())}")
