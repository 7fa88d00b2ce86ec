"""Plain questions to real bundles."""

import json
from pathlib import Path

import pytest

from edgekit.eval.answers import main, plain_questions
from edgekit.export.pipeline import convert


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint) -> Path:  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp("answers") / "bundle"
    convert(tiny_checkpoint("llama"), out, weights="fp32", formats=["onnx"], verify=False)
    return out


def test_every_model_answers_every_question(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.json"
    assert main(["--model", f"a={bundle}", "--model", f"b={bundle}", "-o", str(out)]) == 0
    records = json.loads(out.read_text(encoding="utf-8"))
    assert [r["question"] for r in records] == plain_questions()
    assert all(r["a"] == r["b"] for r in records)
    assert json.loads(capsys.readouterr().out) == records


@pytest.mark.parametrize("model", ["bundle", "a=", "question=b"])
def test_bad_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", model]) == 2
    assert "allowed: NAME=BUNDLE" in capsys.readouterr().err


def test_missing_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", f"a={tmp_path / 'none'}"]) == 1
    assert "none" in capsys.readouterr().err
