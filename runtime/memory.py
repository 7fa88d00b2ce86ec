"""How much memory a bundle needs: the peak of a process that loads it, reads and decodes."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekit.runtime.apart import answer, measured_apart
from edgekit.runtime.workload import Options, at_depths, greedy, open_model, prompt_ids

__all__ = ["Memory", "measure_memory", "status_bytes"]

DECODED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peak resident memory in bytes.

    Attributes:
        load: while loading and compiling.
        depth: while reading on to each depth and decoding there; None where the kernel does not let
            the peak be reset, as every figure would then include the loading.
        prompt: while reading the longest prompt in a second session; None with no prompt.
        total: the highest of all.
    """

    load: int
    depth: dict[str, int] | None
    prompt: int | None
    total: int


def measure_memory(bundle: str | Path, options: Options) -> Memory | None:
    """Run the workload in a process of its own and return its peaks.

    Returns:
        None where `/proc` does not tell (not Linux).

    Raises:
        EngineError: if that process fails.
    """
    if status_bytes("VmHWM") is None:
        return None
    return measured_apart("edgekit.runtime.memory", Memory, bundle, options)


def _memory_here(bundle: Path, options: Options) -> Memory:
    model = open_model(bundle, options)
    loaded, resettable = _peak(), _reset_peak()
    ids = prompt_ids(model, options.longest)
    depths = {}
    for depth, session, logits in at_depths(model, ids, options.depths):
        greedy(session, logits, DECODED)
        depths[str(depth)] = _peak()
        _reset_peak()
    prompt = None
    if options.prompts:
        model.session().append(ids[: max(options.prompts)])
        prompt = _peak()
    return Memory(
        load=loaded,
        depth=depths if resettable else None,
        prompt=prompt,
        total=max(loaded, prompt or 0, *depths.values()),
    )


def status_bytes(name: Literal["VmHWM", "VmRSS"]) -> int | None:
    """The peak (`VmHWM`) or the present size of this process's resident memory.

    `ru_maxrss` would count what its parent held at the start. None where `/proc` does not tell (not
    Linux).
    """
    file = Path("/proc/self/status")
    if not file.is_file():
        return None
    lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _peak() -> int:
    peak = status_bytes("VmHWM")
    assert peak is not None  # `measure_memory` has looked
    return peak


def _reset_peak() -> bool:
    """Let VmHWM start again from the present; False where the kernel does not allow it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


if __name__ == "__main__":
    answer(_memory_here, sys.argv[1:])
