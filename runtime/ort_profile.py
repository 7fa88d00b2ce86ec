"""ONNX Runtime's profile of a session: what the operators of each run took."""

import json
from bisect import bisect_right
from pathlib import Path

from edgekit.runtime.engine import OperatorTime

__all__ = ["operator_times"]

RUN, NODE, TIMED = "model_run", "Node", "_kernel_time"


def operator_times(profile: Path) -> list[dict[str, OperatorTime]]:
    """Of each run, in order: how many operators of a type ran, and for how long.

    Args:
        profile: the JSON trace that `InferenceSession.end_profiling` names; times are microseconds.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    begins = sorted(event["ts"] for event in events if event["name"] == RUN)
    found: list[dict[str, OperatorTime]] = [{} for _ in begins]
    for event in events:
        if event.get("cat") != NODE or not event["name"].endswith(TIMED):
            continue
        run = found[bisect_right(begins, event["ts"]) - 1]
        kind = event["args"]["op_name"]
        count, seconds = run.get(kind, (0, 0.0))
        run[kind] = OperatorTime(count + 1, seconds + 1e-6 * event["dur"])
    return found
