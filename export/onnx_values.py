"""Handles of the ONNX graph: tensors that are emitted when their name is first asked for.

Waiting lets a consumer choose a cheaper form: a sum that a norm follows becomes one operator, parts
of a fused linear layer that are wanted side by side are never split, and values get their
normaliser column for free.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.export.onnx_file import OnnxFile
from edgekit.export.onnx_linear import Columns, LinearWriter, joint_name
from edgekit.export.onnx_side import SideWriter

__all__ = ["Decay", "Joint", "Part", "Repeated", "Rotated", "Sum", "Value", "pair"]


class Value:
    """One tensor of the graph, `[B, T, width]` unless said otherwise."""

    def __init__(self, emit: Callable[[], str] | str) -> None:
        """A value that exists under a name, or one that `emit` will add to the graph."""
        self._emit = emit
        self._name: str | None = emit if isinstance(emit, str) else None

    @property
    def name(self) -> str:
        """The ONNX value's name; the first call emits its operators."""
        if self._name is None and not isinstance(self._emit, str):
            self._name = self._emit()
        assert self._name is not None
        return self._name

    @property
    def pending(self) -> bool:
        """Whether nothing has been emitted yet."""
        return self._name is None

    def settle(self, name: str) -> None:
        """Say that another operator has produced this value as `name`."""
        self._name = name


def pair(emit: Callable[[], Sequence[str]]) -> tuple[Value, Value]:
    """Two values that one emission makes."""
    both = functools.cache(emit)
    return Value(lambda: both()[0]), Value(lambda: both()[1])


class Sum(Value):
    """A residual sum, which the following norm may compute itself."""

    def __init__(self, x: Value, y: Value, emit: Callable[[], str]) -> None:
        super().__init__(emit)
        self.x, self.y = x, y


class Rotated(Value):
    """A value rotated by its positions, which an attention operator may do itself."""

    def __init__(self, source: Value, emit: Callable[[], str]) -> None:
        super().__init__(emit)
        self.source = source


class Repeated(Value):
    """Heads repeated `times` times, copies adjacent."""

    def __init__(self, source: Value, width: int, times: int, emit: Callable[[], str]) -> None:
        super().__init__(emit)
        self.source, self.width, self.times = source, width, times


@dataclass(frozen=True, slots=True)
class Decay:
    """What a log decay is computed from; `times` repeats of heads are folded into its weights."""

    x: Value
    down: str
    up: str
    times: int = 1


class Joint(Value):
    """Channels of q and then of k, `[B, C, T]`, which q and k can still be taken from."""

    def __init__(self, widths: tuple[int, int], emit: Callable[[], str]) -> None:
        super().__init__(emit)
        self.widths = widths


@dataclass(slots=True)
class _Use:
    """How a part of a fused layer is wanted."""

    columns: Columns | None = None
    width: int = 1
    times: int = 1


class FusedLinear:
    """Several linear layers over one input, as one product and one split."""

    def __init__(
        self,
        file: OnnxFile,
        writer: LinearWriter,
        side: SideWriter,
        x: Value,
        names: Sequence[str],
    ) -> None:
        """Nothing is emitted before a part is asked for."""
        self._file, self._writer, self._side, self._x, self._names = file, writer, side, x, names
        self._uses = [_Use() for _ in names]
        self._joined = False
        self._mask: str | None = None
        self._parts: list[str] | None = None

    def parts(self) -> list["Part"]:
        """One handle per layer."""
        return [Part(self, i) for i in range(len(self._names))]

    @property
    def pending(self) -> bool:
        """Whether the form can still be chosen."""
        return self._parts is None

    def lay_out(self, index: int, columns: Columns, times: int, mask: str) -> None:
        """Give part `index` extra columns and repeats, and zero every part of padded tokens."""
        assert self.pending
        self._uses[index] = _Use(columns=columns, width=columns.total, times=times)
        self._mask = mask

    def repeat(self, index: int, width: int, times: int) -> None:
        """Repeat the heads (of `width` columns) of part `index`."""
        assert self.pending
        self._uses[index].width, self._uses[index].times = width, times

    def whole(self) -> str:
        """All parts side by side, unsplit."""
        assert self.pending
        return self._product()[0]

    def first_two(self) -> str:
        """The first two parts side by side."""
        self._joined = True
        return self._split()[0]

    def part(self, index: int) -> str:
        """Part `index` alone."""
        return self._split()[index - 1 if self._joined and index else index]

    def _product(self) -> tuple[str, list[int]]:
        columns = [use.columns for use in self._uses]
        y, widths = self._writer.fused(self._x.name, self._names, columns)
        return self._side.added(y, self._x.name, self._names, columns, widths), widths

    def _split(self) -> list[str]:
        if self._parts is None:
            name = joint_name(self._names)
            y, widths = self._product()
            if self._mask is not None:
                y = self._file.node("Mul", [y, self._mask], f"{name}.mask")
            if any(use.times > 1 for use in self._uses):
                y, widths = self._repeat(y, widths, name)
            if self._joined:
                widths = [widths[0] + widths[1], *widths[2:]]
            self._parts = self._divide(y, widths, name)
        return self._parts

    def _divide(self, y: str, widths: list[int], name: str) -> list[str]:
        if len(widths) == 1:
            return [y]
        sizes = self._file.constant(widths)
        return self._file.nodes("Split", [y, sizes], f"{name}.split", len(widths), axis=-1)

    def _repeat(self, y: str, widths: list[int], name: str) -> tuple[str, list[int]]:
        """Repeat heads by one gather of the widest units that every repeated head is made of."""
        unit = math.gcd(*widths, *(use.width for use in self._uses if use.times > 1))
        columns = np.arange(sum(widths) // unit)
        pieces, start = [], 0
        for use, width in zip(self._uses, widths, strict=True):
            part = columns[start : start + width // unit]
            if use.times > 1:
                part = part.reshape(-1, use.width // unit).repeat(use.times, axis=0).reshape(-1)
            pieces.append(part)
            start += width // unit
        wider = [len(piece) * unit for piece in pieces]
        units = self._file.node(
            "Reshape", [y, self._file.constant([0, 0, -1, unit])], f"{name}.units"
        )
        order = self._file.constant(np.concatenate(pieces))
        taken = self._file.node("Gather", [units, order], f"{name}.repeat", axis=2)
        flat = self._file.constant([0, 0, sum(wider)])
        return self._file.node("Reshape", [taken, flat], f"{name}.repeated"), wider


class Part(Value):
    """One layer of a fused linear layer."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__(lambda: fused.part(index))
        self.fused, self.index = fused, index
