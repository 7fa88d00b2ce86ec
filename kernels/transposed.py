"""Which results of matrix products a Triton program transposes.

Triton 3.4 to 3.7.0 miscompile `dot(trans(f(dot(a, b))), c)` on Hopper: gradients are silently wrong
(flash-linear-attention, issue 640). Nothing but a GPU shows the wrong numbers; the form itself can
be seen in Triton's intermediate representation, on any machine.
"""

import re
from collections import ChainMap
from dataclasses import dataclass, field

__all__ = ["transposed_products"]

VALUE = r"%[\w-]+(?:#\d+)?"
DEFINITION = re.compile(rf"({VALUE})(?::\d+)? = (.*)")
ITERATED = re.compile(rf"({VALUE}) = ({VALUE})")


def transposed_products(ir: str) -> tuple[str, ...]:
    """The transpositions whose operand comes from a product, in whatever steps.

    Args:
        ir: of one program, the text that `triton.compile(…).asm["ttir"]` holds.

    Returns:
        The names of the values they make; none in a program that is safe.
    """
    reader = _Reader()
    for line in ir.splitlines():
        reader.read(line.split(" loc(")[0].strip())
    return tuple(v.name for v in reader.values if v.kind == "tt.trans" and _from_product(v))


@dataclass(eq=False, slots=True)
class _Value:
    """What one operation makes, and from what."""

    name: str
    kind: str
    sources: list["_Value"] = field(default_factory=list)


def _from_product(value: _Value) -> bool:
    seen, waiting = set(), list(value.sources)
    while waiting:
        at = waiting.pop()
        if at.kind == "tt.dot":
            return True
        if id(at) not in seen and at.kind != "tt.load":
            seen.add(id(at))
            waiting += at.sources
    return False


@dataclass(slots=True)
class _Region:
    """A loop or a branch being read: what its yields become, here and in its next iteration."""

    result: _Value | None = None
    carried: list[_Value] = field(default_factory=list)


class _Reader:
    """Lines in, values out; a name holds until its region ends, then another may have it."""

    def __init__(self) -> None:
        self.values: list[_Value] = []
        self._names: ChainMap[str, _Value] = ChainMap()
        self._regions = [_Region()]

    def read(self, text: str) -> None:
        """One line without its location."""
        opened = _Region()
        if text.startswith("}"):
            closed = self._regions.pop()
            self._names = self._names.parents
            if text.startswith("} else"):  # the other branch makes the same result
                opened.result = closed.result
        inside: dict[str, _Value] = {}
        made = DEFINITION.match(text)
        if made:
            name, right = made.groups()
            kind = right.split()[0].split("(")[0].strip('"')
            opened.result = self._names[name] = self._value(name, kind, self._found(right))
            if kind == "scf.for":
                inside = {
                    n: self._value(n, "carried", self._found(begin))
                    for n, begin in ITERATED.findall(right.partition("iter_args(")[2])
                }
                opened.carried = list(inside.values())
        elif text.startswith("scf.yield"):
            self._yielded(self._found(text))
        if text.endswith("{"):
            self._regions.append(opened)
            self._names = self._names.new_child(inside)

    def _yielded(self, values: list[_Value]) -> None:
        """Results of a region are taken as one: what any of them is made from counts for all."""
        region = self._regions[-1]
        if region.result is not None:
            region.result.sources += values
        for carried, value in zip(region.carried, values, strict=False):
            carried.sources.append(value)

    def _value(self, name: str, kind: str, sources: list[_Value]) -> _Value:
        self.values.append(_Value(name, kind, sources))
        return self.values[-1]

    def _found(self, text: str) -> list[_Value]:
        names = (name.split("#")[0] for name in re.findall(VALUE, text))
        return [self._names[name] for name in names if name in self._names]
