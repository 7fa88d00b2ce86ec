"""How results reach stdout: aligned tables for people, JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgekit import config
from edgekit.errors import UsageError
from edgekit.markdown import markdown_table

__all__ = ["as_json", "as_markdown", "as_table", "size", "write_text"]

UNITS = ("B", "kB", "MB", "GB")


def as_json(value: Any) -> str:
    """A dataclass or plain data as indented JSON."""
    return json.dumps(config.dump(value), indent=1, ensure_ascii=False, default=str)


def as_table(rows: Iterable[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Columns aligned by spaces; numbers to the right, text to the left."""
    body = [[str(cell) for cell in row] for row in rows]
    lines = [list(headers), *body] if headers else body
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [all(_is_number(row[i]) for row in body) for i in range(len(widths))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def as_markdown(rows: Iterable[Sequence[object]], headers: Sequence[str]) -> str:
    """A Markdown table."""
    return markdown_table(rows, headers)


def size(count: int | None) -> str:
    """Bytes as `12.3 MB` (10**6) or the unit that fits, or `-` for None."""
    if count is None:
        return "-"
    power = next((p for p in (3, 2, 1) if count >= 1000**p), 0)
    return f"{count / 1000**power:.1f} {UNITS[power]}" if power else f"{count} {UNITS[0]}"


def write_text(text: str, path: Path | None) -> None:
    """Print `text`, or write it to `path`.

    Raises:
        UsageError: if the file cannot be written.
    """
    if path is None:
        print(text)
        return
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as cause:
        raise UsageError(f"{path}: cannot be written ({cause.strerror})") from cause


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).replace(",", "").isdigit()
