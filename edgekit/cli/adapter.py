"""Adapters on a workstation: look at them, merge them into a model, fold them to plain LoRA.

edgekit adapter info ADAPTER
edgekit adapter merge SOURCE [ADAPTER[:WEIGHT]...] -o MODEL
edgekit adapter fold ADAPTER[:WEIGHT]... -o LORA
edgekit adapter pack AFLORA -o VECTORS.safetensors
edgekit adapter onnx BUNDLE ADAPTER[:WEIGHT] -o FILE.onnx_adapter
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.cli.arguments import add_json, pair
from edgekit.cli.extras import extra
from edgekit.cli.output import as_json, as_table, size

if TYPE_CHECKING:
    from edgekit.adapters.merge import MergeReport

__all__ = ["HELP", "add_arguments", "run"]

HELP = "look at adapters, merge them into a model, fold them to plain LoRA"
SHOWN = 5  # modules that a table names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs below this one and their flags."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="action", required=True)
    info = verbs.add_parser("info", help="what an adapter holds", allow_abbrev=False)
    info.add_argument("adapter", type=Path, metavar="ADAPTER")
    add_json(info)
    info.set_defaults(action=_info)
    merge = verbs.add_parser(
        "merge", help="a Hugging Face model, with adapters merged into it", allow_abbrev=False
    )
    merge.add_argument("source", metavar="SOURCE")
    _add_adapters(merge, "MODEL", least="*")
    merge.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    merge.add_argument(
        "--lines", type=pair, metavar="FIRST,LAST", help="factors in the first and last layer"
    )
    merge.add_argument("--untie", action="store_true", help="give an adapted head its own matrix")
    merge.set_defaults(action=_merge)
    fold = verbs.add_parser(
        "fold", help="LoRA or AFLoRA adapters as one plain LoRA, exactly", allow_abbrev=False
    )
    _add_adapters(fold, "LORA")
    fold.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    fold.set_defaults(action=_fold)
    pack = verbs.add_parser(
        "pack", help="the vectors of an AFLoRA adapter without its projections", allow_abbrev=False
    )
    pack.add_argument("adapter", type=Path, metavar="AFLORA")
    pack.add_argument("-o", "--output", type=Path, required=True, metavar="VECTORS.safetensors")
    pack.add_argument("--half", action="store_true", help="in 16 bits")
    pack.set_defaults(action=_pack)
    onnx = verbs.add_parser(
        "onnx", help="a file for ONNX Runtime's own adapters on a bundle", allow_abbrev=False
    )
    onnx.add_argument("bundle", type=Path, metavar="BUNDLE")
    onnx.add_argument("adapter", metavar="ADAPTER[:WEIGHT]")
    onnx.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.onnx_adapter")
    onnx.set_defaults(action=_onnx)


def run(args: argparse.Namespace) -> int:
    """Do what the verb says; returns the exit code."""
    with extra("convert"):
        text: str = args.action(args)
    print(text)
    return 0


def _add_adapters(parser: argparse.ArgumentParser, out: str, least: str = "+") -> None:
    parser.add_argument("adapters", nargs=least, metavar="ADAPTER[:WEIGHT]")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=out)
    parser.add_argument("--force", action="store_true", help=f"replace an existing {out}")
    add_json(parser)


def _info(args: argparse.Namespace) -> str:
    from edgekit.adapters.info import adapter_info

    found = adapter_info(args.adapter)
    if args.json:
        return as_json(found)
    rows = [
        ("adapter", str(args.adapter)),
        ("type", found.kind),
        ("base", found.base or "-"),
        ("modules", f"{len(found.modules)}: {', '.join(found.targets)}"),
        ("ranks", ", ".join(map(str, found.ranks)) or "-"),
        ("parameters", f"{found.parameters:,} ({size(found.bytes)})"),
        ("side path", "yes" if found.low_rank else "no: it can be merged only"),
        ("sha256", found.sha256),
    ]
    if found.frozen_at:
        first, last = found.frozen_at[0], found.frozen_at[-1]
        rows.append(("frozen", f"{len(found.frozen_at)} projections, steps {first} to {last}"))
    return as_table(rows)


def _merge(args: argparse.Namespace) -> str:
    from edgekit.adapters.merge import merge_adapters
    from edgekit.cli.progress import Progress
    from edgekit.sources.adapted import LiNeS
    from edgekit.sources.adapters import parse_choice

    lines = None if args.lines is None else LiNeS(first=args.lines[0], last=args.lines[1])
    with Progress() as progress:
        report = merge_adapters(
            args.source,
            args.output,
            [parse_choice(text) for text in args.adapters],
            dtype=args.dtype,
            lines=lines,
            untie=args.untie,
            force=args.force,
            progress=progress.step,
        )
    return as_json(report) if args.json else _merged(report)


def _merged(report: "MergeReport") -> str:
    rows = [
        ("model", str(report.out)),
        ("dtype", report.dtype),
        ("adapted", f"{len(report.modules)} matrices"),
        *(("note", note) for note in report.notes),
    ]
    if not report.modules:
        return as_table(rows)
    worst = sorted(report.modules, key=lambda module: module.lost, reverse=True)[:SHOWN]
    table = [(m.module, f"{m.ratio:.2g}", f"{m.lost:.2g}") for m in worst]
    headers = ("most is lost in", "rms D / rms W", "lost of D")
    return f"{as_table(rows)}\n\n{as_table(table, headers)}"


def _fold(args: argparse.Namespace) -> str:
    from edgekit.adapters.stack import stack_adapters
    from edgekit.sources.adapters import parse_choice

    choices = [parse_choice(text) for text in args.adapters]
    out = stack_adapters(choices, args.output, dtype=args.dtype, force=args.force)
    result: dict[str, Any] = {"out": str(out), "adapters": [str(c.path) for c in choices]}
    return as_json(result) if args.json else as_table([("lora", str(out))])


def _pack(args: argparse.Namespace) -> str:
    from edgekit.runtime.adapter_file import read_adapter
    from edgekit.runtime.vector_pack import write_pack

    write_pack(read_adapter(args.adapter), args.output, half=args.half)
    return as_table([("vectors", str(args.output)), ("size", size(args.output.stat().st_size))])


def _onnx(args: argparse.Namespace) -> str:
    from edgekit.export.onnx_adapter import write_onnx_adapter
    from edgekit.sources.adapters import parse_choice

    chosen = parse_choice(args.adapter)
    count = write_onnx_adapter(args.bundle, chosen.path, args.output, weight=chosen.weight)
    return as_table([("file", str(args.output)), ("modules", str(count))])
