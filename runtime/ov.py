"""OpenVINO: one compiled model, one infer request per session, the states as its variables.

The only file that imports openvino, but for `ov_shapes.py` and `ov_joining.py`.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from edgekit.bundle import IMAGE_MASS, Manifest
from edgekit.errors import BundleError, EngineError
from edgekit.runtime.engine import (
    Array,
    EngineRequest,
    EngineSettings,
    Floats,
    Integers,
    OperatorTime,
    call_shape,
    state_key,
)
from edgekit.runtime.lowrank import Pair
from edgekit.runtime.ov_joining import join_products
from edgekit.runtime.ov_pairs import StaticRequest, SteppedRequest
from edgekit.runtime.ov_shapes import CHUNK, fix_shapes

__all__ = ["OpenVinoEngine", "OpenVinoRequest"]

LAST_POSITION = "last_position"  # the node that cuts the hidden states down to one position
VIRTUAL_DEVICES = ("AUTO", "BATCH", "HETERO", "MULTI")
SLOT = "adapter."  # how the names of the variables that hold adapters begin


class OpenVinoEngine:
    """A compiled `openvino_model.xml`."""

    def __init__(self, directory: Path, manifest: Manifest, settings: EngineSettings) -> None:
        """Read and compile the model.

        Raises:
            EngineError: if the device is unknown, or refuses the model.
            BundleError: if the IR cannot be read.
        """
        core = ov.Core()
        _check_device(settings.device, core.available_devices)
        started = time.perf_counter()
        graphs = [name for name in manifest.engine_files("openvino") if name.endswith(".xml")]
        decoder, *more = (directory / name for name in graphs)
        self._decoders = _decoders(core, decoder, settings)
        others = [_compiled(core, _read(core, path), path, settings) for path in more]
        self.calls = 0
        self._profiled: ov.InferRequest | None = None
        self._profiling, self._static = settings.profiling, settings.graph == "static"
        self._table: Any = others[0] if others else None
        self._vision = others[1:]
        self.compile_seconds = time.perf_counter() - started
        self.inputs = frozenset(
            name for port in self._decoders[0].inputs for name in port.get_names()
        ) - {"beam_idx"}
        self.keys = {record.openvino: state_key(record) for record in manifest.states}

    def request(self, batch: int) -> EngineRequest:
        """A new infer request with empty variables."""
        requests = [self._request(graph, batch) for graph in self._decoders]
        if len(requests) == 1:
            return requests[0]
        prompt, step = requests
        if self._static:
            return StaticRequest(prompt, step, tokens=CHUNK, batch=batch)
        return SteppedRequest(prompt, step, batch=batch)

    def _request(self, graph: ov.CompiledModel, batch: int) -> "OpenVinoRequest":
        table = None if self._table is None else self._table.create_infer_request()
        request = graph.create_infer_request()
        return OpenVinoRequest(request, table, self.keys, batch, self._called)

    def _called(self, request: ov.InferRequest) -> None:
        """Note a call of the decoder's graph, where calls are timed."""
        if self._profiling:
            self.calls, self._profiled = self.calls + 1, request

    def operator_times(self) -> dict[str, OperatorTime]:
        """Of a mean call, by the operators' type: any request tells it of all calls."""
        return {} if self._profiled is None else _operator_times(self._profiled)

    def look(self, feeds: Mapping[str, Array]) -> Floats:
        """Run the graphs of pictures, one on what the other says; several threads may."""
        x: Array = next(iter(feeds.values()))
        for graph in self._vision:
            first, *others = (port.get_any_name() for port in graph.inputs)
            given = {first: x, **{name: feeds[name] for name in others}}
            (found,) = _inferred(graph.create_infer_request(), given).values()
            x = np.array(found)
        return x

    def lowered(self, pairs: Mapping[str, Pair]) -> dict[str, ov.Tensor]:
        """Values of the variables that hold adapters; weights are in B, so alpha is 1."""
        values = {}
        for module, pair in pairs.items():
            parts = {"a": pair.a, "b": pair.b, "alpha": np.ones((1, pair.rank), np.float32)}
            for part, array in parts.items():
                values[f"{SLOT}{module}.{part}"] = ov.Tensor(np.ascontiguousarray(array))
        return values


class OpenVinoRequest:
    """An infer request; rows are reordered by the next call's `beam_idx`."""

    def __init__(
        self,
        request: ov.InferRequest,
        table: ov.InferRequest | None,
        keys: Mapping[str, str],
        batch: int,
        called: Callable[[ov.InferRequest], None],
    ) -> None:
        self._request, self._table, self._keys, self._called = request, table, keys, called
        self._names = {port.get_any_name() for port in request.model_inputs}
        variables = {state.name: state for state in request.query_state()}
        self._variables = {keys[n]: s for n, s in variables.items() if not n.startswith(SLOT)}
        self._slots = {name: s for name, s in variables.items() if name.startswith(SLOT)}
        self._used: set[str] = set()
        self._rows: Integers = np.arange(batch)
        self._settled = self._rows.astype(np.int32)
        self._pending = False
        outputs = {name for port in request.model_outputs for name in port.get_names()}
        self._watched = IMAGE_MASS in outputs
        self.image_mass: Floats | None = None

    def infer(self, feeds: Mapping[str, Array]) -> Floats:
        """Run the graph; logits are copied out of the request's memory."""
        rows = self._rows.astype(np.int32) if self._pending else self._settled
        given = {**feeds, "beam_idx": rows}
        result = _inferred(self._request, {n: x for n, x in given.items() if n in self._names})
        self._called(self._request)
        if self._pending:
            self._settle(len(self._rows))
        # A graph with recurrent layers pads time on the right; those positions are nobody's.
        logits: Floats = np.array(result["logits"][:, : call_shape(feeds)[1]])
        if self._watched:
            self.image_mass = np.array(result[IMAGE_MASS])
        return logits

    def embed(self, ids: Integers) -> Floats:
        """Rows of the token table."""
        (found,) = _inferred(self._table, {0: ids}).values()
        rows: Floats = np.array(found)
        return rows

    def _settle(self, batch: int) -> None:
        self._rows = np.arange(batch)
        self._settled = self._rows.astype(np.int32)
        self._pending = False

    def reset(self, batch: int) -> None:
        """Return every state to its initial value; `reset_state` would wipe adapters too."""
        for state in self._variables.values():
            state.reset()
        self._settle(batch)

    def use_adapters(self, lowered: Mapping[str, ov.Tensor]) -> None:
        """Set the variables of some slots, and empty those of the others."""
        for name in self._used - lowered.keys():
            self._slots[name].reset()
        for name, tensor in lowered.items():
            self._slots[name].state = tensor
        self._used = set(lowered)

    def reorder(self, rows: Integers) -> None:
        """Remember the order; the graph gathers each state by it at the next call."""
        self._rows = self._rows[rows]
        self._pending = True

    def read_states(self) -> dict[str, Array]:
        """Copies of the variables, with a pending reorder applied."""
        copies = {key: np.array(state.state.data) for key, state in self._variables.items()}
        if not self._pending:
            return copies
        return {key: value[self._rows] for key, value in copies.items()}

    def write_states(self, states: Mapping[str, Array]) -> None:
        """Set the variables."""
        for key, state in self._variables.items():
            state.state = ov.Tensor(np.ascontiguousarray(states[key]))
        self._settle(len(next(iter(states.values()))))


def _decoders(core: ov.Core, path: Path, settings: EngineSettings) -> list[ov.CompiledModel]:
    """The decoder as `settings.graph` wants it: what reads prompts first, then what reads a token.

    Both are made from one model in memory, so that the file is mapped once, and compiled together.
    """
    model = _read(core, path)
    if settings.logits == "all":
        _keep_all_positions(model, path)
    graphs = [model]
    if settings.graph != "dynamic":
        graphs.append(model.clone())
        fix_shapes(graphs[1], 1)
    if settings.graph == "static":
        fix_shapes(model, CHUNK)
    elif settings.graph == "stepped":
        join_products(graphs[1])
    with ThreadPoolExecutor(len(graphs)) as pool:
        return list(pool.map(lambda graph: _compiled(core, graph, path, settings), graphs))


def _read(core: ov.Core, path: Path) -> ov.Model:
    try:
        return core.read_model(path)
    except RuntimeError as cause:
        raise BundleError(f"{path}: cannot be read ({_reason(cause)})") from cause


def _compiled(
    core: ov.Core, model: ov.Model, path: Path, settings: EngineSettings
) -> ov.CompiledModel:
    try:
        return core.compile_model(model, settings.device, _properties(settings))
    except RuntimeError as cause:
        raise EngineError(
            f"{settings.device}: OpenVINO cannot compile {path.name} ({_reason(cause)})"
        ) from cause


def _inferred(request: ov.InferRequest, inputs: Mapping[Any, Array]) -> Any:
    """What one call returns, in the request's own memory."""
    try:
        return request.infer(inputs, share_inputs=True, share_outputs=True)
    except RuntimeError as cause:
        raise EngineError(f"OpenVINO failed: {_reason(cause)}") from cause


def _operator_times(request: ov.InferRequest) -> dict[str, OperatorTime]:
    """By the type that the device runs; OpenVINO tells the mean of all calls of the model."""
    found: dict[str, OperatorTime] = {}
    for node in request.profiling_info:
        count, seconds = found.get(node.node_type, (0, 0.0))
        if node.status == node.EXECUTED:
            took = seconds + node.real_time.total_seconds()
            found[node.node_type] = OperatorTime(count + 1, took)
    return found


def _properties(settings: EngineSettings) -> dict[str, Any]:
    """The compile settings; a recurrent state accumulates, so nothing may narrow it unasked."""
    properties: dict[str, Any] = {
        **settings.hints,
        "INFERENCE_PRECISION_HINT": settings.precision,
    }
    if settings.device == "CPU":
        properties["KV_CACHE_PRECISION"] = settings.precision
        if settings.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = settings.threads
    if settings.profiling:
        properties["PERF_COUNT"] = True
    if settings.cache_dir is not None:
        properties["CACHE_DIR"] = str(settings.cache_dir)
    return properties


def _check_device(device: str, available: list[str]) -> None:
    kind = device.split(":")[0]
    plain = {name.split(".")[0] for name in available}
    if kind not in plain | set(available) | set(VIRTUAL_DEVICES):
        raise EngineError(
            f"device {device!r} is not here; OpenVINO finds: {', '.join(available) or 'none'}"
        )


def _keep_all_positions(model: ov.Model, path: Path) -> None:
    """Feed the head all positions instead of the last one."""
    nodes = [node for node in model.get_ops() if node.get_friendly_name() == LAST_POSITION]
    if not nodes:
        raise BundleError(
            f"{path}: no node {LAST_POSITION!r}, so only the last position's logits can be had"
        )
    source = nodes[0].input_value(0)
    for target in nodes[0].output(0).get_target_inputs():
        target.replace_source_output(source)
    model.validate_nodes_and_infer_types()


def _reason(cause: Exception) -> str:
    """The last line of OpenVINO's report: the ones before it say where in its own source."""
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
