import argparse

import pytest

from edgekit.cli.arguments import choices, layers, natural, positive


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", (0,)), ("0,5-7", (0, 5, 6, 7)), ("3-3", (3,)), ("5-7,6,1", (1, 5, 6, 7))],
)
def test_layers(text: str, expected: tuple[int, ...]) -> None:
    assert layers(text) == expected


@pytest.mark.parametrize("text", ["", "a", "7-5", "1,,2", "-1", "1-", "1-2-3", "1.5", "²"])
def test_bad_layers_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 0,5-7"):
        layers(text)


def test_choices() -> None:
    assert choices(("openvino", "onnx"))("onnx,openvino") == ("onnx", "openvino")


@pytest.mark.parametrize("text", ["", "tflite", "onnx,onnx", "onnx,"])
def test_bad_choices_list_what_is_allowed(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: openvino, onnx, each once"):
        choices(("openvino", "onnx"))(text)


def test_natural_and_positive() -> None:
    assert natural("0") == 0
    assert positive("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="1 or more"):
        positive("0")
    with pytest.raises(argparse.ArgumentTypeError, match="0 or more"):
        natural("x")
