"""What models say to plain questions, side by side: fluency cannot be read off a perplexity.

Example:
    python -m edgekit.eval.answers --model teacher=softmax --model student=lawcat -o answers.json

Greedy, through the bundle's own chat template.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from edgekit.command import guarded
from edgekit.errors import UsageError

__all__ = ["answers", "main", "plain_questions"]

MAX_NEW_TOKENS = 96


def plain_questions() -> list[str]:
    """The ten questions that ship with edgekit."""
    text = (resources.files("edgekit.eval") / "questions.txt").read_text(encoding="utf-8")
    return text.splitlines()


def answers(
    bundles: Mapping[str, str | Path],
    questions: Sequence[str],
    *,
    engine: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[dict[str, str]]:
    """Ask every bundle every question.

    Args:
        bundles: directories by the name to show.
        questions: one user turn each.
        engine: as `edgekit.runtime.load`.
        max_new_tokens: at most so many per answer.

    Returns:
        One record a question: `question`, and each model's answer under its name.

    Raises:
        BundleError: if a bundle is damaged.
        UsageError: if a bundle has no chat template.
    """
    from edgekit.runtime import load

    records = [{"question": question} for question in questions]
    for name, bundle in bundles.items():
        model = load(bundle, engine=engine)
        for record in records:
            prompt = model.chat_prompt([{"role": "user", "content": record["question"]}])
            record[name] = model.generate(prompt, max_new_tokens=max_new_tokens).strip()
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, print, and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, metavar="NAME=BUNDLE")
    parser.add_argument("--engine", choices=("openvino", "onnx"))
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    return guarded("answers", lambda: _asked(args))


def _asked(args: argparse.Namespace) -> str:
    records = answers(_named(args.model), plain_questions(), engine=args.engine)
    text = json.dumps(records, indent=1, ensure_ascii=False)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")
    return text


def _named(models: Sequence[str]) -> dict[str, str]:
    pairs = dict(model.partition("=")[::2] for model in models)
    if not all(pairs.values()) or "question" in pairs:
        raise UsageError(f"--model {' '.join(models)} given; allowed: NAME=BUNDLE")
    return pairs


if __name__ == "__main__":
    sys.exit(main())
