import argparse

import pytest

from edgekit.command import guarded, numbers, setting
from edgekit.errors import UsageError


def test_numbers() -> None:
    assert numbers("0,1024, 4096") == (0, 1024, 4096)


@pytest.mark.parametrize("text", ["", "1k", "1,", "-4", "1-4"])
def test_bad_numbers_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 0,1024"):
        numbers(text)


def test_settings_are_toml_or_words() -> None:
    assert setting("a.b=[1, 2]") == ("a.b", [1, 2])
    assert setting("mixer=lolcats") == ("mixer", "lolcats")
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: KEY=VALUE"):
        setting("mixer")


def test_an_error_is_one_line_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> str:
        raise UsageError("two\nlines")

    assert guarded("name", fail) == UsageError.exit_code
    assert capsys.readouterr().err == "name: error: two lines\n"
    assert guarded("name", lambda: "done") == 0
    assert capsys.readouterr().out == "done\n"
