"""Tables in Markdown, for reports, cards and the command line."""

from collections.abc import Iterable, Sequence

__all__ = ["markdown_table"]


def markdown_table(rows: Iterable[Sequence[object]], headers: Sequence[object]) -> str:
    """One line for the headers, one for the rule, one for each row."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
