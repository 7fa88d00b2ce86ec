"""Which results of matrix products a Triton program transposes.

Triton 3.4 to 3.7.0 miscompile `dot(trans(f(dot(a, b))), c)` on Hopper: gradients are silently wrong
(flash-linear-attention, issue 640). Nothing but a GPU shows the wrong numbers; the form itself can
be seen in Triton's intermediate representation, on any machine.
"""

import re
from collections.abc import Mapping

__all__ = ["transposed_products"]

VALUE = r"%[\w-]+(?:#\d+)?"
DEFINITION = re.compile(rf"({VALUE})(?::\d+)? = (.*)")
ITERATED = re.compile(rf"({VALUE}) = ({VALUE})")


def transposed_products(ir: str) -> tuple[str, ...]:
    """The transpositions whose operand comes from a product, in whatever steps.

    Args:
        ir: of one program, the text that `triton.compile(…).asm["ttir"]` holds.

    Returns:
        The values they make; none in a program that is safe.
    """
    sources, kinds = _graph(ir)
    return tuple(
        value
        for value, kind in kinds.items()
        if kind == "tt.trans" and _reaches_product(value, sources, kinds)
    )


def _reaches_product(
    value: str, sources: Mapping[str, list[str]], kinds: Mapping[str, str]
) -> bool:
    seen, open_values = {value}, list(sources[value])
    while open_values:
        at = open_values.pop()
        kind = kinds.get(at, "")
        if kind == "tt.dot":
            return True
        if at not in seen and kind != "tt.load":
            seen.add(at)
            open_values += sources.get(at, [])
    return False


def _graph(ir: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What each value is made from, through loops and branches too, and by which operation."""
    sources: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    open_regions: list[tuple[str, list[str], int]] = []  # result, carried values, yields to come
    for line in ir.splitlines():
        text = line.split(" loc(")[0].strip()
        made = DEFINITION.match(text)
        if made:
            result, right = made.groups()
            kinds[result] = right.split()[0].split("(")[0].strip('"')
            sources[result] = re.findall(VALUE, right)
            if kinds[result] == "scf.for":
                carried = ITERATED.findall(right)
                sources |= {inside: [begin] for inside, begin in carried}
                open_regions.append((result, [inside for inside, _ in carried], 1))
            elif kinds[result] == "scf.if":
                open_regions.append((result, [], 2))
        elif text.startswith("scf.yield") and open_regions:
            _close(text, open_regions, sources)
    return sources, kinds


def _close(
    text: str, open_regions: list[tuple[str, list[str], int]], sources: dict[str, list[str]]
) -> None:
    """Tie what the innermost region yields to its results and to its next iteration."""
    result, carried, left = open_regions.pop()
    if left > 1:
        open_regions.append((result, carried, left - 1))
    for i, value in enumerate(re.findall(VALUE, text)):
        sources.setdefault(f"{result}#{i}", []).append(value)
        sources[result].append(value)
        if i < len(carried):
            sources[carried[i]].append(value)
