"""ONNX Runtime's profile of a session: what its operators took."""

import json
from collections import defaultdict
from pathlib import Path

from edgekit.runtime.engine import OperatorTime

__all__ = ["operator_times"]

RUN, NODE, TIMED = "model_run", "Node", "_kernel_time"


def operator_times(profile: Path) -> dict[str, OperatorTime]:
    """Of a mean run: how many operators of a type ran, and for how long.

    Args:
        profile: the JSON trace that `InferenceSession.end_profiling` names; times are microseconds.
    """
    events = json.loads(profile.read_text(encoding="utf-8"))
    runs = sum(event["name"] == RUN for event in events)
    nodes, seconds = defaultdict[str, int](int), defaultdict[str, float](float)
    for event in events:
        if event.get("cat") == NODE and event["name"].endswith(TIMED):
            kind = event["args"]["op_name"]
            nodes[kind] += 1
            seconds[kind] += 1e-6 * event["dur"]
    return {kind: OperatorTime(nodes[kind] / runs, seconds[kind] / runs) for kind in nodes}
