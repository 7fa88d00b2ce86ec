"""A bundle's OpenVINO graph with every shape fixed, as an NPU needs it.

The bundle's own graph takes any number of tokens; an NPU compiles fixed shapes alone. So there are
two graphs of the same weights, both of batch 1: one reads a chunk of the prompt in a call, the
other decodes a token. States have one shape in both and go from the one to the other as they are.
A prompt that is no whole number of chunks begins with padding (`attention_mask` 0), which leaves an
empty state empty.

    python -m edgekit.export.static_shapes BUNDLE -o OUT [--chunk 64]

Only layers whose state is constant in size (LAWCAT, LoLCATs) can be had so. The graphs are tested
on OpenVINO's CPU; on an NPU they were not run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import openvino as ov

from edgekit import targets
from edgekit.bundle import check_files, read_manifest
from edgekit.command import guarded, module_parser, parsed, whole
from edgekit.errors import BundleError
from edgekit.export.openvino_file import save_ir
from edgekit.runtime.ov_shapes import CHUNK, fix_shapes
from edgekit.staging import staged

__all__ = ["main", "write_static"]

TARGET = "intel-npu"
FILES = {"chunk": "openvino_chunk.xml", "step": "openvino_step.xml"}


def write_static(bundle: str | Path, out: str | Path, *, chunk: int = CHUNK) -> None:
    """Write `openvino_chunk` and `openvino_step`, each `.xml` and `.bin`, into a new directory.

    Args:
        bundle: the bundle's directory.
        out: the directory to make.
        chunk: tokens that the first graph reads in a call, 1 to 64.

    Raises:
        UsageError: for another `chunk`, or a bundle whose shapes cannot be fixed.
        BundleError: if the bundle is missing or damaged, or `out` exists or cannot be written.
    """
    directory = Path(bundle)
    manifest = read_manifest(directory)
    targets.check_serves(targets.load(TARGET), manifest)
    names = manifest.engine_files("openvino")
    check_files(directory, manifest, iter(names))
    with staged(out) as work:
        for name, tokens in (("chunk", chunk), ("step", 1)):
            model = _read(directory / names[0])
            fix_shapes(model, tokens)
            save_ir(model, work / FILES[name])


def _read(path: Path) -> ov.Model:
    try:
        return ov.Core().read_model(path)
    except RuntimeError as cause:
        raise BundleError(f"{path}: OpenVINO cannot read it; convert the model again") from cause


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = module_parser("edgekit.export.static_shapes", __doc__)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True)
    parser.add_argument(
        "--chunk", type=_tokens, default=CHUNK, help=f"tokens of a call (default: {CHUNK})"
    )
    args, _ = parsed(parser, argv)

    def work() -> str:
        write_static(args.bundle, args.output, chunk=args.chunk)
        return f"{args.output}: {', '.join(FILES.values())}"

    return guarded("static_shapes", work)


def _tokens(text: str) -> int:
    try:
        return whole(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; allowed: 1 to {CHUNK}") from None


if __name__ == "__main__":
    sys.exit(main())
