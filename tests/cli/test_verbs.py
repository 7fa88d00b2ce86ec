import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Edgekit = Callable[..., Any]
ENGINES = ("openvino", "onnx")


def test_convert_writes_a_verified_bundle(
    edgekit: Edgekit, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--format", "openvino", "--weights", "fp32", "--json")
    done = edgekit("convert", checkpoint, "-o", out, *options)
    assert done.code == 0, done.err
    assert done.json["verification"]["openvino"]["max_abs"] < 1e-3
    assert done.err.splitlines()[0].startswith("[1/4] tokenizer")
    again = edgekit("convert", checkpoint, "-o", out, *options)
    assert again.code == 1
    assert "--force" in again.err
    assert edgekit("convert", checkpoint, "-o", out, *options, "--no-verify", "--force").code == 0


def test_convert_table_names_the_layers_that_stay_softmax(
    edgekit: Edgekit, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hybrid"
    done = edgekit(
        "convert", checkpoint, "-o", out, "--mixer", "lawcat", "--state-sharing", "kv_head",
        "--softmax-layers", "0,2-2", "--format", "openvino", "--weights", "fp32",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "against PyTorch" in done.out
    assert "softmax 0, lawcat 1, softmax 2" in edgekit("inspect", out).out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--mixer", "magic"), "mixer 'magic' is unknown; known: lawcat, "),
        (("--mixer", "lawcat", "--softmax-layers", "9"), "softmax layer 9 given; allowed: 0 to 2"),
        (("--target", "pentium"), "'pentium' is unknown"),
    ],
    ids=["mixer", "layer", "target"],
)
def test_convert_refuses_what_the_model_has_not(
    edgekit: Edgekit, checkpoint: Path, tmp_path: Path, option: tuple[str, ...], message: str
) -> None:
    done = edgekit("convert", checkpoint, "-o", tmp_path / "out", *option)
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_convert_of_a_missing_source(edgekit: Edgekit, tmp_path: Path) -> None:
    done = edgekit("convert", tmp_path / "none", "-o", tmp_path / "out")
    assert done.code == 1
    assert str(tmp_path / "none") in done.err


@pytest.mark.parametrize("engine", ENGINES)
def test_run_streams_the_same_text_as_json_reports(
    edgekit: Edgekit, bundle: Path, engine: str
) -> None:
    options = ("run", bundle, "-p", "hello", "-n", "8", "--engine", engine)
    streamed = edgekit(*options, "--stats")
    reported = edgekit(*options, "--json").json
    assert streamed.code == 0
    assert streamed.out == reported["text"] + "\n"
    assert "8 new tokens" in streamed.err
    assert reported["prompt"].startswith("<|im_start|>user\nhello")
    assert reported["stats"]["new_tokens"] == 8
    assert reported["engine"] == engine


def test_run_raw_leaves_the_prompt_alone(edgekit: Edgekit, bundle: Path) -> None:
    assert edgekit("run", bundle, "-p", "hello", "--raw", "-n", "1", "--json").json["prompt"] == (
        "hello"
    )


def test_run_finds_the_template_in_the_tokenizer_configuration(
    edgekit: Edgekit, checkpoint: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = (source / "chat_template.jinja").read_text()
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").unlink()
    options = ("--format", "onnx", "--weights", "fp32", "--no-verify")
    assert edgekit("convert", source, "-o", tmp_path / "out", *options).code == 0
    done = edgekit("run", tmp_path / "out", "-p", "hello", "-n", "1", "--json")
    assert done.json["prompt"].startswith("<|im_start|>user\nhello")


def test_run_reads_standard_input(
    edgekit: Edgekit, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    done = edgekit("run", bundle, "-p", "-", "--raw", "-n", "1", "--json")
    assert done.json["prompt"] == "from a pipe"


def test_run_beams(edgekit: Edgekit, bundle: Path) -> None:
    done = edgekit("run", bundle, "-p", "hello", "-n", "4", "--num-beams", "2")
    assert done.code == 0


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        (("--device", "TPU"), 1, "device 'TPU'"),
        (("--top-p", "3"), 2, "top_p"),
        (("--num-beams", "2", "--temperature", "1"), 2, "beam search does not sample"),
    ],
    ids=["device", "top-p", "beams"],
)
def test_run_refuses(
    edgekit: Edgekit, bundle: Path, option: tuple[str, ...], code: int, message: str
) -> None:
    done = edgekit("run", bundle, "-p", "x", *option)
    assert done.code == code
    assert message in done.err
    assert done.err.count("\n") == 1


def test_run_refuses_a_prompt_longer_than_the_context(edgekit: Edgekit, bundle: Path) -> None:
    done = edgekit("run", bundle, "-p", "word " * 600)
    assert done.code == 2
    assert "softmax layers see at most 512" in done.err


def test_inspect_checks_every_file(edgekit: Edgekit, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    assert edgekit("inspect", copy, "--check").code == 0
    with (copy / "config.json").open("a") as file:
        file.write(" ")
    assert edgekit("inspect", copy).code == 0
    done = edgekit("inspect", copy, "--check")
    assert done.code == 1
    assert "config.json: damaged" in done.err


def test_inspect_json_is_the_manifest(edgekit: Edgekit, bundle: Path) -> None:
    assert edgekit("inspect", bundle, "--json").json == json.loads(
        (bundle / "edgekit.json").read_text()
    )


def test_doctor_finds_both_engines(edgekit: Edgekit) -> None:
    done = edgekit("doctor", "--json")
    assert done.code == 0
    assert [engine["error"] for engine in done.json["engines"]] == [None, None]
    assert "CPU" in done.json["engines"][0]["devices"]
    packages = {package["name"]: package for package in done.json["packages"]}
    assert packages["numpy"]["ok"]
    assert "torch" in packages
    assert "no problems found" in edgekit("doctor").out or done.json["problems"]


def test_targets_marks_this_machine(edgekit: Edgekit) -> None:
    done = edgekit("targets")
    assert done.code == 0
    assert "\n*" in done.out or done.out.startswith("*")
    assert edgekit("targets", "generic-x86", "--json").json["name"] == "generic-x86"


def test_eval_of_bundle_and_source_agree(
    edgekit: Edgekit, bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    texts = (tmp_path / "a.txt", tmp_path / "b.txt")
    for text in texts:
        text.write_text("The capital of France is Paris. " * 20)
    options = ("--task", "perplexity", "--text", *texts, "--window", "64")
    ours = edgekit("eval", bundle, *options, "--json").json
    reference = edgekit("eval", checkpoint, *options, "--json").json
    assert ours["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-4)
    assert (ours["engine"], reference["engine"]) == ("openvino", "torch")
    table = edgekit("eval", bundle, *options).out
    assert f"tokens         {ours['tokens']}" in table


def test_eval_of_a_missing_text(edgekit: Edgekit, bundle: Path) -> None:
    done = edgekit("eval", bundle, "--task", "perplexity", "--text", "nowhere.txt")
    assert done.code == 2
    assert "nowhere.txt: cannot be read" in done.err
