"""ONNX Runtime: one inference session, one IO binding per request, states updated in place.

With contrib operators a state's buffer is bound as past and as present, so nothing is copied:
recurrent states keep their size, keys and values live in buffers of doubling capacity of which the
attention mask says how much is filled. A graph of plain operators gets fresh present tensors
instead, which become the next call's past.

The only file that imports onnxruntime.
"""

import shutil
import tempfile
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import (
    onnxruntime_pybind11_state as failures,
)

from edgekit.bundle import FRESH_STATES, IMAGE_MASS, Manifest, StateRecord
from edgekit.errors import BundleError, EngineError
from edgekit.runtime.engine import (
    Array,
    EngineSettings,
    Floats,
    Integers,
    OperatorTime,
    call_shape,
    state_key,
)
from edgekit.runtime.lowrank import Pair
from edgekit.runtime.ort_profile import operator_times
from edgekit.runtime.state import state_shape

__all__ = ["OnnxEngine", "OnnxRequest"]

FIRST_CAPACITY = 256  # columns of keys and values before the buffers double
FAILURES = (
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NoModel,
    failures.NoSuchFile,
    failures.NotImplemented,
    failures.RuntimeException,
    RuntimeError,  # what a failed run raises
)


class OnnxEngine:
    """A loaded `model.onnx`."""

    def __init__(self, directory: Path, manifest: Manifest, settings: EngineSettings) -> None:
        """Load and optimise the graph.

        Raises:
            EngineError: if the device is not the CPU, or this onnxruntime lacks an operator.
            BundleError: if the file cannot be read.
        """
        if settings.device != "CPU":
            raise EngineError(f"device {settings.device!r} given; the onnx engine runs on: CPU")
        started = time.perf_counter()
        options = _session_options(settings, constant_shapes=manifest.constant_memory)
        self.calls = 0
        self._profiled = settings.profiling
        if settings.profiling:
            folder = tempfile.mkdtemp()
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "calls"))
        graphs = [name for name in manifest.engine_files("onnx") if name.endswith(".onnx")]
        opened = [_opened(directory / name, options) for name in graphs]
        self.session, self.table, self._vision = [*opened, None, None][:3]
        self.compile_seconds = time.perf_counter() - started
        self.records = manifest.states
        self.vocab = manifest.model.vocab_size
        self.all_positions = settings.logits == "all"
        self.inputs = frozenset(item.name for item in self.session.get_inputs())
        self.watched = IMAGE_MASS in {item.name for item in self.session.get_outputs()}
        fresh = FRESH_STATES in self.session.get_modelmeta().custom_metadata_map
        self.in_place = _shares_states(manifest) and not fresh

    def called(self) -> None:
        """Count a call of the decoder's graph, where calls are timed."""
        self.calls += self._profiled

    def operator_times(self) -> dict[str, OperatorTime]:
        """Of a mean call, by the operators' type; ends the profiling."""
        return operator_times(Path(self.session.end_profiling())) if self._profiled else {}

    def request(self, batch: int) -> "OnnxRequest":
        """A new IO binding with states of its own."""
        return InPlaceRequest(self, batch) if self.in_place else FreshRequest(self, batch)

    def look(self, feeds: Mapping[str, Array]) -> Floats:
        """Run the graph of pictures; safe to use from several threads."""
        assert self._vision is not None
        first, *others = (item.name for item in self._vision.get_inputs())
        given = {first: next(iter(feeds.values())), **{name: feeds[name] for name in others}}
        return _answered(self._vision, given)

    def lowered(self, pairs: Mapping[str, Pair]) -> dict[str, onnxruntime.OrtValue]:
        """Values of the optional inputs that hold adapters: A `[in, r]` and B `[r, out]`."""
        make, values = onnxruntime.OrtValue.ortvalue_from_numpy, {}
        for module, pair in pairs.items():
            values[f"{module}.lora_A"] = make(np.ascontiguousarray(pair.a.T))
            values[f"{module}.lora_B"] = make(np.ascontiguousarray(pair.b.T))
        return values


def _opened(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (failures.InvalidProtobuf, failures.NoSuchFile, failures.InvalidGraph) as cause:
        raise BundleError(f"{path}: cannot be read ({cause})") from cause
    except FAILURES as cause:
        raise EngineError(f"{path}: ONNX Runtime refuses this model ({cause})") from cause


def _answered(session: onnxruntime.InferenceSession, given: Mapping[str, Array]) -> Floats:
    """The only output."""
    try:
        (found,) = session.run(None, dict(given))
    except FAILURES as cause:
        raise EngineError(f"ONNX Runtime failed: {cause}") from cause
    answer: Floats = found
    return answer


def _shares_states(manifest: Manifest) -> bool:
    """Whether the graph's operators let one buffer be past and present at once."""
    steps = [step for step in manifest.pipeline if step.get("step") == "onnx"]
    return any(step.get("ops") == "contrib" for step in steps)


def _session_options(
    settings: EngineSettings, *, constant_shapes: bool
) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # One pattern would be kept for each length of a growing mask.
    options.enable_mem_pattern = constant_shapes
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    return options


class OnnxRequest(ABC):
    """Feeds and logits; how the states are bound is left to the two kinds below."""

    def __init__(self, engine: OnnxEngine, batch: int) -> None:
        self._engine = engine
        self._binding = engine.session.io_binding()
        self._columns = 0
        self._used: dict[str, onnxruntime.OrtValue] = {}
        self.image_mass: Floats | None = None
        self.reset(batch)

    def embed(self, ids: Integers) -> Floats:
        """Rows of the token table."""
        return _answered(self._engine.table, {"input_ids": ids})

    def infer(self, feeds: Mapping[str, Array]) -> Floats:
        """Run the graph; the logits are written straight into the array that is returned."""
        _, length = call_shape(feeds)
        self._bind_states(length)
        logits = self._call(feeds)
        self._columns += length
        self._keep_states()
        return logits

    def _call(self, feeds: Mapping[str, Array]) -> Floats:
        batch, length = call_shape(feeds)
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        positions = 1
        if self._engine.all_positions:
            positions = length
            self._binding.bind_ortvalue_input("logits_to_keep", make(np.array(length)))
        logits = np.empty((batch, positions, self._engine.vocab), dtype=np.float32)
        self._binding.bind_ortvalue_output("logits", make(logits))
        mass = np.empty((batch, 1), dtype=np.float32) if self._engine.watched else None
        if mass is not None:
            self._binding.bind_ortvalue_output(IMAGE_MASS, make(mass))
        try:
            self._engine.session.run_with_iobinding(self._binding)
        except FAILURES as cause:
            raise EngineError(f"ONNX Runtime failed: {cause}") from cause
        self._engine.called()
        self.image_mass = mass
        return logits

    def reset(self, batch: int) -> None:
        """Start from zero states, and from no keys and values."""
        self._columns = 0
        records = self._engine.records
        self._adopt({r: np.zeros(state_shape(r, "onnx", batch, 0), r.dtype) for r in records})

    def use_adapters(self, lowered: Mapping[str, onnxruntime.OrtValue]) -> None:
        """Bind the inputs of some slots, and rank 0 to those that were bound before."""
        empty = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(_without_rank(name, value.shape()))
            for name, value in self._used.items()
            if name not in lowered
        }
        for name, value in (empty | dict(lowered)).items():
            self._binding.bind_ortvalue_input(name, value)
        self._used = dict(lowered)

    def reorder(self, rows: Integers) -> None:
        """Gather the rows of every state."""
        self._adopt({record: state[rows] for record, state in self._states().items()})

    def read_states(self) -> dict[str, Array]:
        """Copies of the filled part of every state."""
        return {state_key(record): state.copy() for record, state in self._states().items()}

    def write_states(self, states: Mapping[str, Array]) -> None:
        """Copy the states in."""
        given = {record: states[state_key(record)] for record in self._engine.records}
        grown = [state.shape[2] for record, state in given.items() if _grows(record)]
        self._columns = grown[0] if grown else 0
        self._adopt({record: state.copy() for record, state in given.items()})

    @abstractmethod
    def _states(self) -> dict[StateRecord, Array]:
        """The filled part of every state, perhaps as views."""

    @abstractmethod
    def _adopt(self, states: dict[StateRecord, Array]) -> None:
        """Own these arrays, of exact size, as the states."""

    @abstractmethod
    def _bind_states(self, length: int) -> None:
        """Prepare the bindings for a call of `length` tokens."""

    @abstractmethod
    def _keep_states(self) -> None:
        """Take over what the call produced."""


class InPlaceRequest(OnnxRequest):
    """Each state's buffer is past and present at once."""

    def __init__(self, engine: OnnxEngine, batch: int) -> None:
        self._buffers: dict[StateRecord, Array] = {}
        super().__init__(engine, batch)

    def _states(self) -> dict[StateRecord, Array]:
        filled = slice(0, self._columns)
        return {r: a[:, :, filled] if _grows(r) else a for r, a in self._buffers.items()}

    def _adopt(self, states: dict[StateRecord, Array]) -> None:
        for record, array in states.items():
            buffer = self._buffers.get(record)
            if buffer is not None and _fits(array, buffer):
                buffer[:, :, : array.shape[2]] = array
            else:
                self._buffers[record] = np.ascontiguousarray(array)
                self._bind(record)

    def _call(self, feeds: Mapping[str, Array]) -> Floats:
        """Row by row where the attention operator takes only one sequence at a time."""
        batch, length = call_shape(feeds)
        if batch == 1 or length == 1 or self._columns == 0 or not any(map(_grows, self._buffers)):
            return super()._call(feeds)
        logits, masses = [], []
        for row in range(batch):
            alone = slice(row, row + 1)
            for record in self._buffers:
                self._bind(record, alone)
            logits.append(super()._call(_of_rows(feeds, alone)))
            masses.append(self.image_mass)
        for record in self._buffers:
            self._bind(record)
        found = [mass for mass in masses if mass is not None]
        self.image_mass = np.concatenate(found) if found else None
        return np.concatenate(logits)

    def _bind(self, record: StateRecord, rows: slice = slice(None)) -> None:
        buffer = self._buffers[record][rows]  # rows lie one after the other: a view
        if not buffer.size:
            return
        value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
        self._binding.bind_ortvalue_input(record.onnx[0], value)
        self._binding.bind_ortvalue_output(record.onnx[1], value)

    def _bind_states(self, length: int) -> None:
        needed = self._columns + length
        for record, buffer in self._buffers.items():
            if not _grows(record) or buffer.shape[2] >= needed:
                continue
            batch, heads, _, width = buffer.shape
            grown = np.zeros((batch, heads, max(2 * needed, FIRST_CAPACITY), width), buffer.dtype)
            grown[:, :, : self._columns] = buffer[:, :, : self._columns]
            self._buffers[record] = grown
            self._bind(record)

    def _keep_states(self) -> None:
        """Nothing: the buffers hold them already."""


class FreshRequest(OnnxRequest):
    """Each call allocates its present states, which the next call reads."""

    def _states(self) -> dict[StateRecord, Array]:
        return {record: value.numpy() for record, value in self._values.items()}

    def _adopt(self, states: dict[StateRecord, Array]) -> None:
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        self._values = {r: make(np.ascontiguousarray(array)) for r, array in states.items()}

    def _bind_states(self, length: int) -> None:
        self._binding.clear_binding_outputs()
        for record, value in self._values.items():
            self._binding.bind_ortvalue_input(record.onnx[0], value)
            self._binding.bind_output(record.onnx[1])

    def _keep_states(self) -> None:
        outputs = self._binding.get_outputs()
        self._values = dict(zip(self._engine.records, outputs, strict=False))


def _fits(array: Array, buffer: Array) -> bool:
    """Whether `buffer` can hold `array`: alike but for more room along the growing axis."""
    apart = buffer.shape[:2] == array.shape[:2] and buffer.shape[3:] == array.shape[3:]
    return apart and buffer.shape[2] >= array.shape[2]


def _without_rank(name: str, shape: list[int]) -> Floats:
    """What an unset `{module}.lora_A [in, r]` or `.lora_B [r, out]` holds."""
    sizes = (shape[0], 0) if name.endswith("A") else (0, shape[1])
    return np.zeros(sizes, np.float32)


def _of_rows(feeds: Mapping[str, Array], rows: slice) -> dict[str, Array]:
    """The same for some rows; positions of three axes have these first."""
    return {
        name: array[:, rows] if name == "position_ids" and array.ndim == 3 else array[rows]
        for name, array in feeds.items()
    }


def _grows(record: StateRecord) -> bool:
    return record.kind in ("key", "value")
