"""Which targets can run which bundle, by real bundles' manifests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit import targets
from edgekit.bundle import Manifest, read_manifest
from edgekit.cli.main import main
from edgekit.errors import UsageError
from edgekit.export.pipeline import convert

Bundle = Callable[[str], Path]
KINDS = {
    "softmax": {},
    "lawcat": {"mixer": "lawcat"},
    "slots": {"mixer": "lawcat", "adapter_slots": "q_proj"},
    "onnx": {"mixer": "lawcat", "formats": ("onnx",)},
}


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """`bundle("lawcat")` is its directory, made once; read-only."""
    folder = tmp_path_factory.mktemp("serving")

    def made(kind: str) -> Path:
        options = {"formats": ("openvino",), "weights": "fp32", **KINDS[kind]}
        if not (folder / kind).exists():
            convert(tiny_checkpoint("llama"), folder / kind, verify=False, **options)
        return folder / kind

    return made


@pytest.fixture(scope="module")
def lawcat(bundle: Bundle) -> Manifest:
    return read_manifest(bundle("lawcat"))


@pytest.mark.parametrize("name", targets.names())
def test_every_target_serves_recurrent_layers(name: str, lawcat: Manifest) -> None:
    targets.check_serves(targets.load(name), lawcat)


@pytest.mark.parametrize(
    ("kind", "refused", "reason"),
    [
        ("softmax", {"intel-npu"}, "caches of 3 softmax layers grow with the text; convert with"),
        ("slots", {"intel-npu"}, "adapter slots take any rank; merge the adapters"),
        ("onnx", {"intel-npu", "intel-igpu", "intel-arc"}, "needs openvino, and it has onnx; conv"),
    ],
)
def test_some_refuse_a_bundle_and_say_what_to_do(
    kind: str, refused: set[str], reason: str, bundle: Bundle
) -> None:
    manifest = read_manifest(bundle(kind))
    for name in targets.names():
        if name not in refused:
            targets.check_serves(targets.load(name), manifest)
            continue
        with pytest.raises(UsageError, match=f"target {name} cannot serve .*{reason}"):
            targets.check_serves(targets.load(name), manifest)


def test_weights_must_fit_their_share_of_the_memory(lawcat: Manifest) -> None:
    target = replace(targets.load("generic-x86"), memory_budget=0.5)
    weights = sum(lawcat.files[name].size for name in lawcat.engine_files("openvino"))
    targets.check_serves(target, lawcat, 2 * weights)
    with pytest.raises(UsageError, match=r"its weights have .* GB.*convert with fewer bits"):
        targets.check_serves(target, lawcat, 2 * weights - 2)


def test_command_says_of_each_target_whether_it_serves(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["targets", "--bundle", str(bundle("softmax"))]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    answers = dict(rows)
    assert set(answers) == set(targets.names())
    assert answers.pop("intel-npu").startswith("its graph is static")
    assert set(answers.values()) == {"yes"}


def test_command_refuses_a_target_that_does_not_serve(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["targets", "intel-npu", "--bundle", str(bundle("softmax"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "target intel-npu cannot serve this bundle" in line
    assert main(["targets", "intel-npu", "--bundle", str(bundle("lawcat"))]) == 0


@pytest.mark.parametrize("name", targets.names())
def test_command_shows_every_setting_with_its_origin(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["targets", name]) == 0
    shown = capsys.readouterr().out
    for setting, origin in targets.load(name).provenance.items():
        assert any(
            line.startswith(setting) and line.endswith(origin) for line in shown.splitlines()
        )
