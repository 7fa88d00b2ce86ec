"""Show what a bundle holds, from its manifest; nothing is loaded."""

import argparse
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from edgekit import bundle
from edgekit.bundle import Manifest, VisionFacts
from edgekit.cli.arguments import add_json
from edgekit.cli.output import as_json, as_table, size

__all__ = ["HELP", "add_arguments", "run"]

HELP = "show what a bundle holds, and check it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument(
        "--check", action="store_true", help="compare the sha256 of every file with the manifest"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the manifest; returns the exit code."""
    manifest = bundle.read_manifest(args.bundle)
    if args.check:
        bundle.check_files(args.bundle, manifest)
    if args.json:
        print(as_json(manifest))
        return 0
    print(as_table(_summary(manifest)))
    print()
    files = [(name, size(f.size), f.sha256[:12]) for name, f in manifest.files.items()]
    print(as_table(files, ("file", "size", "sha256")))
    if args.check:
        print(f"\nall {len(manifest.files)} files are as they were written")
    return 0


def _summary(manifest: Manifest) -> Iterator[tuple[str, str]]:
    model = manifest.model
    yield "source", f"{manifest.source.get('name', '?')} ({manifest.source.get('kind', '?')})"
    yield "family", f"{model.family}, {model.num_layers} layers, vocabulary {model.vocab_size}"
    steps = (step for step in manifest.pipeline if step.get("step") == "student")
    yield from (("student", _student(step)) for step in steps)
    if manifest.vision is not None:
        yield "pictures", _pictures(manifest.vision)
    spins = (step for step in manifest.pipeline if step.get("step") == "spin")
    yield from (("spin", _spin(step)) for step in spins)
    yield "mixers", _runs(manifest.mixers)
    yield "state", _state(manifest)
    context = model.context_length
    yield "context", "no limit" if context is None else f"{context} tokens"
    yield "weights", manifest.weights
    if manifest.adapter_slots:
        yield "adapter slots", f"{len(manifest.adapter_slots)} modules"
    yield "engines", ", ".join(manifest.engines)
    yield "target", manifest.target
    yield "pipeline", " > ".join(str(step.get("step", step)) for step in manifest.pipeline) or "-"
    yield "versions", ", ".join(f"{name} {v}" for name, v in sorted(manifest.versions.items()))
    yield "verified", ", ".join(sorted(manifest.verification)) or "no"
    yield "size", size(sum(record.size for record in manifest.files.values()))
    yield "fingerprint", manifest.fingerprint[:16]


def _student(step: dict[str, Any]) -> str:
    """`lawcat, recipe general, 12.3 M tokens`."""
    tokens = sum(stage.get("tokens", 0) for stage in step.get("training", ()))
    name, recipe = step.get("name", "?"), step.get("recipe", "?")
    return f"{name}, recipe {recipe}, {tokens / 1e6:.1f} M tokens"


def _pictures(facts: VisionFacts) -> str:
    """`llava, 576 tokens each, for <image>`."""
    size = "as their size says" if facts.tokens is None else f"{facts.tokens} tokens each"
    return f"{facts.family}, {size}, for {facts.placeholder}"


def _spin(step: dict[str, Any]) -> str:
    """`2 heads, alpha 0.08, by mass, all layers`."""
    heads = f"keep {step['keep']}" if step["suppress"] is None else f"{step['suppress']} heads"
    span = step["layers"]
    layers = "all layers" if span is None else f"layers {span[0]} to {span[1]}"
    return f"{heads}, alpha {step['alpha']}, by {step['score']}, {layers}"


def _runs(mixers: tuple[str, ...]) -> str:
    """`lawcat 0-4, softmax 5` for a mixer of each layer."""
    parts = []
    for name, group in groupby(enumerate(mixers), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in group]
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        parts.append(f"{name} {span}")
    return ", ".join(parts)


def _state(manifest: Manifest) -> str:
    kinds = [state.kind for state in manifest.states]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return f"{counts}: {'constant' if manifest.constant_memory else 'grows with the sequence'}"
