"""Times of the kernels against what memory and tensor cores allow, and against their peers.

    python -m edgekit.kernels.bench -o bench                        on a CUDA device, minutes
    python -m edgekit.kernels.bench -o bench --cpu                  a rehearsal, tiny; with
                                        TRITON_INTERPRET=1 in the environment of the programs too

Every form of an op, and every peer that does the same, must first agree with the reference in
fp64, gradients included, on a small and awkward shape; one that does not is reported and not
timed. The floor of a pass is the longer of two times: of the bytes that must move, at the
bandwidth of a large copy, and of the operations in its products, at the rate of a large product;
both are measured here, first. Rows are in `bench.jsonl` as soon as they are made; at the end it
writes `bench.jsonl`, `bench.md` and, where matplotlib is installed, `bench.png`. Nothing else is
needed but torch and Triton; peers are timed where they are installed (flash-linear-attention:
`fla-core` and `einops`; Liger-Kernel: `liger-kernel`).
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgekit.command import Told, guarded, module_parser, parsed
from edgekit.config import dump
from edgekit.errors import UsageError
from edgekit.figures import write_png
from edgekit.kernels.bench_cases import (
    CASES,
    PROVING,
    SHAPES,
    Call,
    Case,
    Inputs,
    Results,
    Shape,
    Work,
)
from edgekit.kernels.dispatch import forced, interpreted
from edgekit.markdown import markdown_table

__all__ = ["Device", "Row", "main", "measure"]

AGREES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # RMS(error) / RMS(reference)
BUDGET, FEWEST, MOST = 1.0, 5, 100  # seconds and repetitions of one timing
FLUSHED = 256 << 20  # bytes written between repetitions, more than any cache holds
REHEARSAL: dict[str, Any] = {"batch": 1, "time": 256, "heads": 2, "vocabulary": 1031, "hidden": 64}
HEADERS = ("op", "shape", "pass", "form", "ms", "10-90 %", "of the floor", "of the fastest other")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What runs, and how fast it can be.

    Attributes:
        name: of the device.
        versions: of what matters.
        bandwidth: of a large copy, bytes per second.
        rate: of a large product, operations per second.
    """

    name: str
    versions: dict[str, str]
    bandwidth: float
    rate: float

    def floor(self, work: Work) -> float:
        """Seconds that `work` takes at least."""
        return max(work.moved / self.bandwidth, work.operations / self.rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One timing.

    Attributes:
        op: its name.
        shape: name of its sizes.
        backward: whether the backward pass is in it.
        form: ours, or a peer.
        seconds: of each repetition; none if there is a `note`.
        floor: seconds.
        note: why it was not timed.
    """

    op: str
    shape: str
    backward: bool
    form: str
    seconds: tuple[float, ...]
    floor: float
    note: str | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def measure(
    ops: Sequence[str],
    shapes: Sequence[Shape],
    device: str,
    told: Told | None = None,
    keep: Callable[[Device, Row], None] = lambda *_: None,
) -> tuple[Device, list[Row]]:
    """Prove and time every form of every op.

    Args:
        ops: of `CASES`.
        shapes: to time.
        device: `cuda` or `cpu`.
        told: called with a step's name, its number and the count of steps.
        keep: called with each row as soon as it is there.

    Returns:
        What ran, and a row for each form and pass.
    """
    known = _device(device)
    rows: list[Row] = []
    jobs = [(op, shape) for op in ops for shape in shapes]
    for number, (op, shape) in enumerate(jobs):
        if told is not None:
            told(f"{op}, {shape.name}", number, len(jobs))
        for row in _measured(op, shape, device, known):
            keep(known, row)
            rows.append(row)
    return known, rows


def _measured(op: str, shape: Shape, device: str, known: Device) -> Iterator[Row]:
    case = CASES[op]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = case.inputs(shape, dtype, device)
    for name, call, proved in _forms(case, device):
        for backward, work in ((False, case.forward), (True, case.both)):
            if work is None:
                continue
            row = Row(
                op=op,
                shape=shape.name,
                backward=backward,
                form=name,
                seconds=(),
                floor=known.floor(work(shape)),
            )
            try:
                note = _wrong(case, call, dtype, device) if proved else None
                if note is None:
                    row = replace(row, seconds=_timed(call, inputs, backward, device))
                else:
                    row = replace(row, note=note)
            except ImportError:
                row = replace(row, note="not installed")
            except Exception as error:  # whatever a peer raises, the others go on
                row = replace(row, note=" ".join(str(error).split())[:120])
            yield row


def _forms(case: Case, device: str) -> Iterator[tuple[str, Call, bool]]:
    """Name, call, and whether it must agree with the reference."""
    if device == "cuda" or interpreted():
        yield "triton", case.in_form("triton"), True
    yield "torch", case.in_form("torch"), True
    yield "reference", case.in_form("reference"), False
    if case.compiled and device == "cuda":
        yield "torch.compile", _compiled(case), True
    for name, peer in case.peers.items():
        yield name, peer.call, peer.same


def _compiled(case: Case) -> Call:
    """The reference, compiled for each size that it meets."""
    torch.compiler.reset()
    inner = torch.compile(case.call, dynamic=False)

    def run(inputs: Inputs) -> Results:
        with forced("reference"):
            return inner(inputs)

    return run


def _wrong(case: Case, call: Call, dtype: torch.dtype, device: str) -> str | None:
    """How far a form is from the reference in fp64, if that is too far."""
    torch.manual_seed(0)
    inputs = case.inputs(PROVING, dtype, device)
    exact = {name: _exact(x) for name, x in inputs.items()}
    if "dtype" in exact:
        exact["dtype"] = torch.float64
    # A peer may give the first results alone.
    count, reference = len(call(inputs)), case.in_form("reference")
    wanted = _with_gradients(lambda x: reference(x)[:count], exact, case.both is not None)
    found = _with_gradients(call, inputs, case.both is not None)
    worst = max(_relative(w, f) for w, f in zip(wanted, found, strict=True))
    return None if worst <= AGREES[dtype] else f"WRONG: error {worst:.1e}"


def _exact(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    if not x.is_floating_point():
        return x.cpu()
    return x.detach().cpu().double().requires_grad_(x.requires_grad)


def _with_gradients(call: Call, inputs: Inputs, backward: bool) -> Results:
    results = call(inputs)
    leaves = _leaves(inputs)
    if not (backward and leaves):
        return results
    random = torch.Generator().manual_seed(1)
    by = [torch.randn(r.shape, generator=random).to(r) for r in results]
    return (*results, *torch.autograd.grad(results, leaves, by))


def _leaves(inputs: Inputs) -> list[torch.Tensor]:
    return [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]


def _relative(wanted: torch.Tensor, found: torch.Tensor) -> float:
    wanted, found = wanted.detach().cpu().double(), found.detach().cpu().double()
    error = (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")


def _timed(call: Call, inputs: Inputs, backward: bool, device: str) -> tuple[float, ...]:
    """Seconds of some repetitions, after two that do not count."""
    leaves = _leaves(inputs)

    def run() -> None:
        if not backward:
            with torch.no_grad():
                call(inputs)
            return
        results = call(inputs)
        torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])

    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    *_, once = clock(run, 2)
    return clock(run, max(FEWEST, min(MOST, int(BUDGET / max(once, 1e-6)))))


def _cuda_seconds(run: Callable[[], None], count: int) -> tuple[float, ...]:
    """All repetitions are queued before any is waited for.

    While the host is ahead of the GPU, as with large inputs it is, launches cost nothing.
    """
    event: Any = torch.cuda.Event
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(count)]
    for begin, end in pairs:
        flushed.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return tuple(float(begin.elapsed_time(end)) / 1e3 for begin, end in pairs)


def _cpu_seconds(run: Callable[[], None], count: int) -> tuple[float, ...]:
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return tuple(times)


def _device(device: str) -> Device:
    cuda = device == "cuda"
    count, side = (1 << 28, 8192) if cuda else (1 << 22, 512)
    dtype = torch.bfloat16 if cuda else torch.float32
    source = torch.zeros(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, device=device).to(dtype)  # zeros draw less power, and lie
    copy = _timed(lambda x: (target.copy_(source),), {}, False, device)
    product = _timed(lambda x: (square @ square,), {}, False, device)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("triton", "fla", "liger_kernel"):
        try:
            versions[package] = str(__import__(package).__version__)
        except (ImportError, AttributeError):
            continue
    return Device(
        name=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        versions=versions,
        bandwidth=2.0 * count / statistics.median(copy),
        rate=2.0 * side**3 / statistics.median(product),
    )


def _as_markdown(device: Device, rows: Sequence[Row], command: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in device.versions.items())
    head = (
        f"{device.name}; {versions}; copies at {device.bandwidth / 1e9:.0f} GB/s, products at "
        f"{device.rate / 1e12:.1f} TFLOP/s. Medians, the caches flushed in between.\n\n"
    )
    table = markdown_table([_cells(row, rows) for row in rows], HEADERS)
    return f"{head}{table}\n\nMade by:\n\n    {command}\n"


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    named = (row.op, row.shape, "forward and backward" if row.backward else "forward", row.form)
    if not row.seconds:
        return (*named, row.note or "-", "-", "-", "-")
    cuts = statistics.quantiles(row.seconds, n=10)
    spread = f"{1e3 * cuts[0]:.3f}-{1e3 * cuts[-1]:.3f}"
    same = (row.op, row.shape, row.backward)
    others = [
        other.median
        for other in rows
        if (other.op, other.shape, other.backward) == same and other.seconds
        if other.form not in (row.form, "triton")
    ]
    ratio = f"{row.median / min(others):.2f}" if others and row.form == "triton" else "-"
    times = (f"{1e3 * row.median:.3f}", spread, f"{row.median / row.floor:.2f}", ratio)
    return (*named, *times)


def _draw(rows: Sequence[Row], out: Path) -> None:
    """Each form's time over the floor, one panel for each pass."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.seconds]
    if not timed:
        return
    figure = Figure(figsize=(10, 1.5 + 0.28 * len(timed)), layout="constrained")
    axes = figure.subplots()
    names = [f"{r.op}, {r.shape}{', + backward' if r.backward else ''}: {r.form}" for r in timed]
    colours = ["tab:blue" if r.form == "triton" else "tab:gray" for r in timed]
    axes.barh(names, [r.median / r.floor for r in timed], color=colours)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time over the floor of memory and tensor cores")
    write_png(figure, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print the table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("bench", lambda: _made(args, command))


def _made(args: argparse.Namespace, command: str) -> str:
    if not args.cpu and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device; give --cpu for a rehearsal")
    unknown = [op for op in args.op if op not in CASES]
    if unknown:
        raise UsageError(f"op {unknown[0]!r} given; allowed: {', '.join(CASES)}")
    shapes = [replace(s, **REHEARSAL) for s in SHAPES] if args.cpu else list(SHAPES)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "bench.jsonl").open("w", encoding="utf-8") as file:

        def keep(device: Device, row: Row) -> None:
            print(json.dumps({"device": dump(device), **dump(row)}), file=file, flush=True)

        device, rows = measure(args.op, shapes, "cpu" if args.cpu else "cuda", Told(), keep)
    text = _as_markdown(device, rows, command)
    (args.output / "bench.md").write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        _draw(rows, args.output / "bench.png")
    return text.rstrip("\n")


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.kernels.bench", __doc__)
    add = parser.add_argument
    add("--op", type=lambda text: tuple(text.split(",")), default=tuple(CASES), metavar="OP,OP")
    add("--cpu", action="store_true", help="a rehearsal on tiny shapes")
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
