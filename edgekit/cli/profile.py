"""Measure a bundle: prefill and decode speed, time to first token, loading, memory, state size.

Decoding is measured at each --depth, the number of tokens read before. Figures are the median of
--repeat repetitions; each of them is in the JSON. The engines and numbers of threads of a list are
measured one after the other. Interrupted, it still writes what was measured.

    edgekit profile out --depth 128,4096,32768 --plot latency.png
    edgekit profile out --compare other-bundle --compare last-week.json
    edgekit profile out --peer llama-cpp --peer openvino-genai=softmax-bundle --floor
    edgekit profile out --host user@device     copies runtime and bundle there, and measures there
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.cli.arguments import add_adapters, add_device, add_graph, choices, heard, positive
from edgekit.cli.extras import extra
from edgekit.cli.output import write_text
from edgekit.cli.profile_tables import FORMATS, TABLES, compared_text, floor_table
from edgekit.command import numbers
from edgekit.errors import UsageError
from edgekit.targets.schema import ENGINES

if TYPE_CHECKING:
    from edgekit.profiling.comparison import Measured
    from edgekit.runtime.latency import Options, Report

__all__ = ["HELP", "add_arguments", "run"]

HELP = "measure speed and memory of a bundle"
BUSY = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path)
    add("--engine", type=choices(ENGINES), help="one, or a list such as openvino,onnx")
    add_device(parser)
    add_graph(parser)
    add("--threads", type=numbers, metavar="N,N", help="CPU threads, to sweep (default: as `run`)")
    add_adapters(parser)
    add("--prompt", type=numbers, default=(128, 1024), metavar="N,N", help="prompt lengths")
    add("--gen", type=positive, default=64, metavar="N", help="tokens decoded")
    add("--depth", type=numbers, default=(0, 4096), metavar="N,N", help="tokens read before")
    add("--repeat", type=positive, default=3, metavar="N")
    add("--load", action="store_true", help="load twice more: without and with a cache of blobs")
    add("--ops", action="store_true", help="the time of every type of operator")
    add(
        "--compare",
        action="append",
        default=[],
        type=Path,
        metavar="OTHER",
        help="a bundle to measure after this one, or a report in JSON; may be given again",
    )
    add(
        "--peer",
        action="append",
        default=[],
        type=_peer,
        metavar="NAME[=MODEL]",
        help="another toolkit, in the same call: llama-cpp, openvino-genai or ort-genai; MODEL: "
        "what it reads (default: what the bundle was made from, or the bundle itself)",
    )
    add("--host", metavar="USER@DEVICE", help="another machine, over SSH (keys, no password)")
    add("--floor", action="store_true", help="the least time of a token, from memory's speed")
    add("--plot", type=Path, metavar="FILE", help="a PNG of latency against depth")
    add("--format", choices=FORMATS, default="table")
    add("-o", "--output", type=Path, metavar="FILE", help="write there instead")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    _check(args)
    peers = [(name, _readable(name, model, args.bundle)) for name, model in args.peer]
    ours: list[Report] = []
    others: list[Measured] = []
    floor = ""
    try:
        if args.host is None:
            _measure(args, args.bundle, ours)
        else:
            ours += _measured_there(args)
        _warn_if_busy(ours[0])  # the load before a later one is that of the earlier
        for other in args.compare:
            _add_other(args, other, others)
        for name, model in peers:
            _add_peer(args, name, model, others)
        if args.floor:
            floor = _floors(args, ours)
    finally:  # when interrupted too
        if ours:
            write_text(compared_text(ours, others, args.format) + floor, args.output)
    if args.plot is not None:
        from edgekit.profiling.comparison import named
        from edgekit.profiling.plot import draw_latency

        draw_latency(named([*ours, *others]), args.plot)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse at once what would fail after minutes."""
    for other in args.compare:
        if not other.exists():
            raise UsageError(f"{other} given; allowed: a bundle, or what --format json -o wrote")
    here = [other for other in args.compare if not other.is_file()]
    if args.host is not None and (here or args.peer or args.floor or args.adapters):
        raise UsageError(
            "--host given with something to measure here; allowed beside it: reports to --compare"
        )
    if args.floor and args.format not in TABLES:
        raise UsageError(f"--floor given with --format {args.format}; allowed: {', '.join(TABLES)}")
    for out in (args.plot, args.output):
        if out is not None and not out.parent.is_dir():
            raise UsageError(f"{out} given; {out.parent} is no directory")


def _measure(args: argparse.Namespace, bundle: Path, reports: list["Report"]) -> None:
    """Measure every variant; `reports` has what is known at any time."""
    from edgekit.cli.progress import Progress
    from edgekit.runtime.latency import measure

    for options in _variants(args):
        place = len(reports)

        def keep(report: "Report", place: int = place) -> None:
            reports[place:] = [report]

        with heard(), Progress() as progress:
            measure(bundle, options, progress.step, keep)


def _measured_there(args: argparse.Namespace) -> list["Report"]:
    """The reports of another machine."""
    import json

    from edgekit.cli.progress import Progress
    from edgekit.remote import profile_remotely

    with heard(), Progress() as progress:
        text = profile_remotely(
            args.host,
            args.bundle,
            _said_again(args),
            engines=args.engine or (),
            progress=progress.step,
        )
    return _loaded(json.loads(text), args.host)


def _said_again(args: argparse.Namespace) -> list[str]:
    """The flags of this call that say what to measure."""
    lists = {"engine": args.engine, "threads": args.threads}
    lists |= {"prompt": args.prompt, "depth": args.depth}
    words = [f"--{name}={','.join(map(str, given))}" for name, given in lists.items() if given]
    words += [f"--gen={args.gen}", f"--repeat={args.repeat}"]
    single = {"device": args.device, "graph": args.graph}
    words += [f"--{name}={given}" for name, given in single.items() if given is not None]
    return [*words, *(f"--{name}" for name in ("load", "ops") if getattr(args, name))]


def _variants(
    args: argparse.Namespace, engines: Sequence[str | None] | None = None
) -> Iterator["Options"]:
    """Every engine with every number of threads."""
    from edgekit.runtime.latency import Options

    for engine in engines or args.engine or (None,):
        for threads in args.threads or (None,):
            yield Options(
                prompts=args.prompt,
                depths=args.depth,
                tokens=args.gen,
                repeat=args.repeat,
                engine=engine,
                device=args.device,
                threads=threads,
                graph=args.graph if engine != "onnx" else None,
                starting=args.load,
                operators=args.ops,
                adapters=tuple(args.adapters),
            )


def _add_other(args: argparse.Namespace, other: Path, found: list["Measured"]) -> None:
    if other.is_file():
        found += _read(other)
        return
    reports: list[Report] = []
    try:
        _measure(args, other, reports)
    finally:
        found += reports


def _peer(text: str) -> tuple[str, Path | None]:
    name, _, model = text.partition("=")
    return name, Path(model) if model else None


def _readable(name: str, model: Path | None, bundle: Path) -> Path:
    """The model that a peer is measured on; refuses at once what would fail after minutes."""
    from edgekit.peers import check_installed, default_model
    from edgekit.peers.registry import model_files

    check_installed(name)
    if model is None:
        with extra("convert"):
            return default_model(name, bundle)
    model_files(name, model)
    return model


def _add_peer(args: argparse.Namespace, name: str, model: Path, found: list["Measured"]) -> None:
    """Measure a peer with every number of threads."""
    from edgekit.cli.progress import Progress
    from edgekit.peers import measure_peer

    for options in _variants(args, engines=(None,)):
        with heard(), Progress() as progress:
            found.append(measure_peer(name, model, options, progress.step))


def _floors(args: argparse.Namespace, ours: Sequence["Report"]) -> str:
    """A table of the least time of a token; the threads are those of the first report."""
    from edgekit.peers.floor import floors, measure_bandwidth

    bandwidth = measure_bandwidth(ours[0].threads)
    engines = {report.engine: report for report in ours}
    rows = [
        (engine, floor, next((d for d in report.decode if d.depth == floor.depth), None))
        for engine, report in engines.items()
        for floor in floors(args.bundle, engine, args.depth, bandwidth)
    ]
    return floor_table(bandwidth, rows, markdown=args.format == "md")


def _read(path: Path) -> list["Measured"]:
    """Reports that `--format json` wrote.

    Raises:
        UsageError: if it is something else.
    """
    import json

    from edgekit import config
    from edgekit.peers import PeerReport

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        peers = [item for item in data if "peer" in item]
        reports = _loaded([item for item in data if "peer" not in item], str(path))
        return [
            *reports,
            *(config.load(PeerReport, peer, where=str(path), error=UsageError) for peer in peers),
        ]
    except (ValueError, TypeError) as cause:
        raise UsageError(f"{path}: {cause}; allowed: what --format json -o wrote") from cause


def _loaded(data: list[Any], where: str) -> list["Report"]:
    from edgekit import config
    from edgekit.runtime.latency import Report

    return [config.load(Report, item, where=where, error=UsageError) for item in data]


def _warn_if_busy(report: "Report") -> None:
    load = report.load_average[0] if report.load_average else None
    if load is not None and load > BUSY:
        print(
            f"edgekit: the machine was busy before the measurement (load {load:.1f} on "
            f"{report.cpu_count} CPUs); figures may be too low",
            file=sys.stderr,
        )
