"""The command that soaks a bundle: one session reads a very long text and must not change.

Example:
    python -m edgekit.eval.soak lawcat-fp32 -o soak --source smollm2-135m-instruct \
        --student lawcat --text held-out.txt --tokens 200000

At every checkpoint it takes the memory of the process and the logits. The logits are compared with
those of the student in PyTorch, in fp64, which reads the same tokens in chunks; without --source
and --student, and for rounded weights always, with those of the same bundle in blocks alone. Then
sessions in parallel threads must write what one alone writes.

It writes `soak/soak.json`, `soak/soak.png` and all that it needs to go on after an interruption;
the same command again does that. A text that is too short is repeated.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgekit.bundle import Manifest, read_manifest
from edgekit.command import Told, guarded, module_parser, parsed, whole
from edgekit.config import dump
from edgekit.errors import UsageError, VerificationError
from edgekit.eval.machine import this_machine
from edgekit.eval.reader import Integers, Reader, open_reader
from edgekit.eval.soak_parallel import in_parallel
from edgekit.eval.soak_report import ALLOWED_ERROR, Soak, as_text, compared
from edgekit.eval.soak_walk import JOURNAL, Carried, Route, walk
from edgekit.runtime import Session
from edgekit.runtime.workload import TEXT
from edgekit.utf8 import read_text

__all__ = ["main"]

WALK = "walk"  # folder of what the walk through the bundle leaves
PROMPT, WRITTEN = 256, 64  # tokens of each parallel session


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reference:
    """What the walk of the bundle is compared with.

    Attributes:
        folder: name of what its own walk leaves.
        words: for a sentence.
        begin: makes a reading at position 0.
        settings: JSON-ready; what its logits depend on.
    """

    folder: str
    words: str
    begin: Callable[[], Carried]
    settings: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, write and print what was found.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    args, command = parsed(_parser(), argv)
    return guarded("soak", lambda: _soaked(args, command))


def _soaked(args: argparse.Namespace, command: str) -> str:
    soak = _measured(args, command)
    found = dump(soak) | {"growth": soak.growth, "error": soak.error}
    failures = list(soak.failures())
    text = json.dumps(found | {"failures": failures}, indent=1, ensure_ascii=False)
    _write(args.output / "soak.json", text + "\n")
    from edgekit.eval.soak_plot import draw_soak  # matplotlib would count as memory of the walk

    draw_soak(soak, args.output / "soak.png")
    if failures:
        raise VerificationError(f"{'; '.join(failures)}; see {args.output / 'soak.json'}")
    return text if args.json else as_text(soak)


def _measured(args: argparse.Namespace, command: str) -> Soak:
    manifest = read_manifest(args.bundle)
    route = Route(tokens=args.tokens, checkpoints=args.checkpoints, block=args.block)
    _check(args, manifest)
    reader = open_reader(
        args.bundle,
        logits="last",
        engine=args.engine,
        device=args.device,
        threads=args.threads,
    )
    ids = _ids(reader, args.text, route.tokens)
    reference = _reference(args, reader)
    settings = {
        **reader.identity,
        "engine": reader.engine,
        "device": reader.device,
        "threads": args.threads,
        "ids_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    tell = Told()
    walked, compared_with = args.output / WALK, args.output / reference.folder
    # First of all: what follows is no part of the memory that is judged.
    records = walk(lambda: _session(reader), ids, route, walked, settings, tell)
    parallel = in_parallel(
        lambda: _session(reader), ids[:PROMPT], sessions=args.sessions, tokens=WRITTEN
    )
    at_once = Route(tokens=route.tokens, checkpoints=route.checkpoints, block=route.stretch)
    walk(reference.begin, ids, at_once, compared_with, settings | reference.settings, tell)
    return Soak(
        command=command,
        bundle=Path(args.bundle).resolve().name,
        engine=reader.engine,
        weights=manifest.weights,
        threads=args.threads,
        text="the built-in text" if args.text is None else Path(args.text).name,
        calls=route.calls,
        reference=reference.words,
        allowed_error=ALLOWED_ERROR if manifest.weights == "fp32" else None,
        checkpoints=compared(records, walked, compared_with),
        parallel=parallel,
        machine=this_machine(reader),
    )


def _check(args: argparse.Namespace, manifest: Manifest) -> None:
    """Refuse at once what would be refused after hours.

    Raises:
        UsageError: naming the option.
    """
    limit = manifest.model.context_length
    longest = max(args.tokens, PROMPT + WRITTEN + 1)
    if limit is not None and longest > limit:
        raise UsageError(
            f"{longest} tokens asked for, but the softmax layers of this bundle see {limit}; "
            "soak a bundle without them"
        )
    if args.sessions < 1:
        raise UsageError(f"sessions {args.sessions} given; allowed: 1 or more")
    if manifest.weights != "fp32" and (args.source or args.student):
        raise UsageError(
            f"this bundle has {manifest.weights} weights, which differ from any source; leave "
            "--source and --student out to compare it with itself, read in blocks"
        )
    if (args.source or args.student) and not (args.output / WALK / JOURNAL).exists():
        _check_origin(args, manifest)


def _check_origin(args: argparse.Namespace, manifest: Manifest) -> None:
    """Refuse a source that the bundle was not made from, in a process of its own.

    The memory that this one would need for it, and give back at some time, would hide growth.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_check_origin_here, manifest, args.source, args.student).result()


def _check_origin_here(manifest: Manifest, source: str | None, student: str | None) -> None:
    from edgekit.eval.soak_reference import check_origin

    check_origin(manifest, source, student)


def _ids(reader: Reader, file: Path | None, count: int) -> Integers:
    """Token ids `[count]` of the text, over and over.

    Raises:
        UsageError: if the file cannot be read, or holds nothing.
    """
    ids = reader.tokenizer.encode(
        TEXT if file is None else read_text(file), add_special_tokens=False
    )
    if not len(ids):
        raise UsageError(f"{file}: holds no text; give another file")
    return np.resize(ids, count)


def _reference(args: argparse.Namespace, reader: Reader) -> _Reference:
    if not args.source and not args.student:
        return _Reference(
            folder="blocks",
            words="the same bundle read in blocks",
            begin=lambda: _session(reader),
            settings={},
        )

    def begin() -> Carried:
        from edgekit.eval.soak_reference import open_reference  # torch is no part of the walk

        return open_reference(args.source, args.student, threads=args.threads)

    return _Reference(
        folder="torch",
        words="PyTorch in fp64",
        begin=begin,
        settings={"source": args.source, "student": args.student},
    )


def _session(reader: Reader) -> Session:
    """A new session: what a bundle's reader starts."""
    return cast(Session, reader.start(1))


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _block(text: str) -> int | None:
    """Tokens of a call; None for `mixed`."""
    if text == "mixed":
        return None
    try:
        return whole(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; allowed: mixed, or a number of tokens"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = module_parser("edgekit.eval.soak", __doc__)
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path)
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    add("--source", metavar="SOURCE", help="what the bundle was made from")
    add("--student", metavar="DIR|NAME", help="the student that was put into it")
    add("--text", type=Path, metavar="FILE", help="read over and over (default: a few sentences)")
    add("--tokens", type=int, default=200_000, metavar="N")
    add("--checkpoints", type=int, default=20, metavar="N")
    add(
        "--block",
        type=_block,
        metavar="mixed|N",
        help="tokens of a call; mixed (default): 512, and 1 for the last 128 before a checkpoint",
    )
    add("--sessions", type=int, default=8, metavar="N", help="in parallel threads (default: 8)")
    add("--engine", choices=("openvino", "onnx"))
    add("--device")
    add("--threads", type=int, metavar="N")
    add("--json", action="store_true", help="print what soak.json holds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
