"""Arguments of convert that are refused before a source is read, and what the manifest keeps."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.export.plan import check_choices, make_plan
from edgekit.sources import open_source

GOOD: dict[str, Any] = {
    "student": None,
    "mixer": "lawcat",
    "state_sharing": None,
    "softmax_layers": (),
    "weights": None,
    "formats": ("openvino", "onnx"),
    "onnx_ops": None,
}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mixer": "softmax", "state_sharing": "kv_head"}, "need another mixer"),
        ({"mixer": "lolcats", "state_sharing": "kv_head"}, "allowed: with lawcat"),
        ({"mixer": "softmax", "softmax_layers": (0,)}, "need another mixer"),
        ({"formats": ("openvino",), "onnx_ops": "portable"}, "without the onnx format"),
        ({"formats": ()}, "no format given"),
        ({"formats": ("tflite",)}, "allowed: openvino, onnx"),
        ({"weights": "int2"}, "allowed: fp32, fp16, int8, int4"),
        ({"mixer": "mamba"}, "known: lawcat, "),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_an_option_that_would_not_be_read_is_refused(wrong: dict[str, Any], said: str) -> None:
    check_choices(**GOOD, verify=True)
    with pytest.raises(UsageError, match=said):
        check_choices(**{**GOOD, **wrong}, verify=True)


def test_a_missing_engine_is_said_before_work_begins() -> None:
    """In a process where onnxruntime cannot be found."""
    code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "onnxruntime" else found(name, *a)
from edgekit.errors import EngineError
from edgekit.export.plan import check_choices
check_choices(**{GOOD!r}, verify=False)
try:
    check_choices(**{GOOD!r}, verify=True)
except EngineError as error:
    sys.exit("edgekit-lm[onnx]" not in str(error))
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def planned(checkpoint: Path, **changes: Any) -> Any:
    arguments = {**GOOD, "target": "auto", "calibration": None, **changes}
    return make_plan(open_source(checkpoint), **arguments)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe\xfa", "UTF-8"), (b" \n", "is empty"), (None, "cannot be read")],
    ids=["not-utf8", "empty", "missing"],
)
def test_a_useless_calibration_text_is_refused(
    content: bytes | None, said: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        planned(tiny_checkpoint("llama"), weights="int4", calibration=text)


def test_the_manifest_keeps_the_settings_of_each_engine(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    steps = planned(tiny_checkpoint("llama"), weights="int4").manifest_steps()
    by_name = {step["step"]: step for step in steps}
    assert by_name["mixers"]["trained"] is False
    assert by_name["weights"] == {"step": "weights", "format": "int4"}
    assert by_name["openvino"] == {"step": "openvino", "group_size": 64}
    assert by_name["onnx"] == {"step": "onnx", "ops": "contrib"}
    plain = planned(tiny_checkpoint("llama"), weights="fp32").manifest_steps()
    assert {"step": "openvino"} in plain
