"""How long converting takes, and how much memory, beside Optimum on the same model.

    python -m edgekit.export.beside_optimum MODEL -o DIR [--weights int8] [--repeat 3]

MODEL is a Hugging Face directory; `edgekit adapter merge SOURCE -o MODEL` writes one of any source.
Each run is a process of its own, in turns: `optimum-cli export openvino`, `edgekit convert` as far
as Optimum goes (`--format openvino --no-verify`), and as it is by default: both engines, verified.
"""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.command import Told, guarded, last_line, module_parser, parsed, whole
from edgekit.errors import EngineError, UsageError
from edgekit.markdown import markdown_table

__all__ = ["WEIGHTS", "Conversions", "beside_optimum", "main"]

WEIGHTS = ("fp16", "int8", "int4")
PEER, SAME, WHOLE = "Optimum", "edgekit, the same work", "edgekit, both engines, verified"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversions:
    """One way of converting.

    Attributes:
        name: of the way.
        command: as it can be typed.
        seconds: wall time of each run.
        peak_bytes: peak resident memory of each run.
    """

    name: str
    command: tuple[str, ...]
    seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]


def beside_optimum(
    model: str | Path,
    out: str | Path,
    *,
    weights: str = "int8",
    repeat: int = 3,
    progress: Callable[[str, int, int], None] = lambda name, number, count: None,
) -> list[Conversions]:
    """Convert a model over and over, with Optimum and with edgekit in turns.

    Args:
        model: a Hugging Face directory with a text model.
        out: a directory to make; what is converted lies there for a while.
        weights: `fp16`, `int8` or `int4`.
        repeat: runs of each way.
        progress: called with a run's name, its number and the count of runs.

    Returns:
        Optimum's first, then ours.

    Raises:
        UsageError: if `model` is no such directory, `out` exists, or an argument is not allowed.
        EngineError: if Optimum is not installed, or a conversion fails.
    """
    if weights not in WEIGHTS or repeat < 1:
        raise UsageError(
            f"weights {weights!r} and {repeat} runs given; allowed: {', '.join(WEIGHTS)}, 1 or more"
        )
    if not (Path(model) / "config.json").is_file():
        raise UsageError(
            f"{model} is no Hugging Face directory, which Optimum reads; write one with: "
            f"edgekit adapter merge {model} -o MODEL --dtype bfloat16"
        )
    commands = _commands(str(model), Path(out) / "converted", weights)
    try:
        Path(out).mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{out} exists already; name a directory to make") from None
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for number in range(repeat * len(commands)):
        name = tuple(commands)[number % len(commands)]
        progress(name, number, repeat * len(commands))
        found[name].append(_run(commands[name], Path(out)))
    shutil.rmtree(out)
    return [
        Conversions(
            name=name,
            command=tuple(commands[name]),
            seconds=tuple(seconds for seconds, _ in runs),
            peak_bytes=tuple(peak for _, peak in runs),
        )
        for name, runs in found.items()
    ]


def _commands(model: str, out: Path, weights: str) -> dict[str, list[str]]:
    """What is typed, the same Python's `optimum-cli` among it."""
    optimum = Path(sys.executable).with_name("optimum-cli")
    if not optimum.is_file():
        raise EngineError('Optimum is not installed; pip install "edgekit-lm[optimum]"')
    ours = [sys.executable, "-m", "edgekit", "convert", model, "-o", str(out), "--weights", weights]
    export = [str(optimum), "export", "openvino", "-m", model, "--weight-format", weights]
    return {
        PEER: [*export, "--task", "text-generation-with-past", str(out)],
        SAME: [*ours, "--format", "openvino", "--no-verify"],
        WHOLE: ours,
    }


def _run(command: Sequence[str], out: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one conversion, which is removed."""
    log = out / "log.txt"
    with log.open("wb") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        told = last_line(log.read_text(encoding="utf-8", errors="replace"))
        raise EngineError(f"{' '.join(command[:4])} … failed: {told}")
    shutil.rmtree(out / "converted")
    return seconds, usage.ru_maxrss * 1024


def as_table(found: Sequence[Conversions]) -> str:
    """Medians, their range, and each way's ratio to the first."""
    first = found[0]
    rows = [
        [
            ways.name,
            _spread(ways.seconds, 1),
            f"{_ratio(ways.seconds, first.seconds):.2f}",
            _spread([peak / 1e6 for peak in ways.peak_bytes], 0),
            f"{_ratio(ways.peak_bytes, first.peak_bytes):.2f}",
        ]
        for ways in found
    ]
    return markdown_table(rows, ["", "wall, s", "ratio", "peak RSS, MB", "ratio"])


def _spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(ours) / statistics.median(theirs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = module_parser("edgekit.export.beside_optimum", __doc__)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("--weights", choices=WEIGHTS, default="int8")
    parser.add_argument("--repeat", type=whole, default=3, metavar="N")
    parser.add_argument("--json", action="store_true", help="every run, as JSON")
    args, _ = parsed(parser, argv)

    def work() -> str:
        found = beside_optimum(
            args.model,
            args.output,
            weights=args.weights,
            repeat=args.repeat,
            progress=Told(),
        )
        data: list[dict[str, Any]] = [dataclasses.asdict(ways) for ways in found]
        return json.dumps(data, indent=2) if args.json else as_table(found)

    return guarded("beside_optimum", work)


if __name__ == "__main__":
    sys.exit(main())
