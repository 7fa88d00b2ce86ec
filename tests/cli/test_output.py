import json
from pathlib import Path

import pytest

from edgekit.cli.output import as_json, as_markdown, as_table, size, write_text
from edgekit.errors import UsageError


def test_table_aligns_numbers_right_and_text_left() -> None:
    table = as_table([("a", "1.5"), ("longer", "100")], ("name", "value"))
    assert table == "name    value\na         1.5\nlonger    100"


def test_markdown() -> None:
    assert as_markdown([("a", 1)], ("x", "y")) == "| x | y |\n| --- | --- |\n| a | 1 |"


def test_json_of_paths_and_tuples() -> None:
    assert json.loads(as_json({"out": Path("a"), "sizes": (1, 2)})) == {"out": "a", "sizes": [1, 2]}


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (3840, "3.8 kB"), (12_345_678, "12.3 MB")],
)
def test_size(count: int | None, text: str) -> None:
    assert size(count) == text


def test_unwritable_output_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_text("x", tmp_path / "no" / "such" / "folder")
