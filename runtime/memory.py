"""How much memory a bundle needs: the peak of a process that loads it, reads and decodes."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit import config
from edgekit.errors import EdgekitError, EngineError
from edgekit.runtime.workload import Options, at_depths, greedy, open_model, prompt_ids

__all__ = ["Memory", "measure_memory"]

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
    if not Path("/proc/self/status").is_file():
        return None
    plain = json.dumps(config.dump(replace(options, memory=False)))
    command = [sys.executable, "-P", "-m", "edgekit.runtime.memory", str(bundle), plain]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"{bundle}: the process that measures memory failed: {reason}")
    return config.load(Memory, json.loads(done.stdout.splitlines()[-1]), where="memory")


def _memory_here(bundle: str | Path, options: Options) -> Memory:
    model = open_model(bundle, options)
    loaded, resettable = _peak_rss(), _reset_peak()
    ids = prompt_ids(model, options.longest)
    depths = {}
    for depth, session, logits in at_depths(model, ids, options.depths):
        greedy(session, logits, DECODED)
        depths[str(depth)] = _peak_rss()
        _reset_peak()
    prompt = None
    if options.prompts:
        model.session().append(ids[: max(options.prompts)])
        prompt = _peak_rss()
    return Memory(
        load=loaded,
        depth=depths if resettable else None,
        prompt=prompt,
        total=max(loaded, prompt or 0, *depths.values()),
    )


def _peak_rss() -> int:
    """VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _reset_peak() -> bool:
    """Let VmHWM start again from the present; False where the kernel does not allow it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def _main(arguments: Sequence[str], write: Callable[[str], object]) -> None:
    bundle, plain = arguments
    options = config.load(Options, json.loads(plain), where="options")
    write(json.dumps(config.dump(_memory_here(bundle, options))) + "\n")


if __name__ == "__main__":
    try:
        _main(sys.argv[1:], sys.stdout.write)
    except EdgekitError as error:
        sys.exit(str(error))
