"""Whether a target can run a bundle, before anything is loaded."""

from edgekit.bundle import Manifest
from edgekit.errors import UsageError
from edgekit.targets.schema import Target

__all__ = ["check_serves", "fitting_graph"]


def check_serves(target: Target, manifest: Manifest, memory: int | None = None) -> None:
    """Refuse a bundle that a target cannot run.

    Args:
        target: the profile.
        manifest: of the bundle.
        memory: bytes of the machine that is to run it; None: not looked at.

    Raises:
        UsageError: with the first reason, and what to do.
    """
    reason = _engine(target, manifest) or _graph(target, manifest)
    if reason is None and memory is not None:
        reason = _memory(target, manifest, memory)
    if reason is not None:
        raise UsageError(f"target {target.name} cannot serve this bundle: {reason}")


def _engine(target: Target, manifest: Manifest) -> str | None:
    """Any engine has a CPU; other devices are the target's engine's alone."""
    if target.device == "CPU" or target.engine in manifest.engines:
        return None
    return (
        f"{target.device} needs {target.engine}, and it has {', '.join(manifest.engines)}; "
        f"convert again with --format {target.engine}"
    )


def _graph(target: Target, manifest: Manifest) -> str | None:
    if target.graph != "static":
        return None
    if not manifest.constant_memory:
        layers = manifest.mixers.count("softmax")
        return (
            f"its graph is static, and the caches of {layers} softmax layers grow with the text; "
            "convert with --mixer lawcat or a student, without --softmax-layers"
        )
    if manifest.adapter_slots:
        return "its graph is static, and adapter slots take any rank; merge the adapters"
    if manifest.vision is not None:
        return "its graph is static, and pictures take calls of other lengths; use another target"
    return None


def fitting_graph(target: Target, manifest: Manifest, memory: int | None) -> str:
    """The target's form of the graph, or `dynamic` where a graph of a step cannot be had beside it.

    A step's graph needs states of fixed sizes, and holds the weights a second time: they may take
    half of the budget then.

    Args:
        target: the profile.
        manifest: of the bundle.
        memory: bytes of the machine; None: not looked at.
    """
    if target.graph != "stepped":
        return target.graph
    if not manifest.constant_memory or manifest.adapter_slots:
        return "dynamic"
    twice = 2 * _weight_bytes(target, manifest)
    return "stepped" if memory is None or twice <= target.memory_budget * memory else "dynamic"


def _weight_bytes(target: Target, manifest: Manifest) -> int:
    """Of the engine's files, on disk."""
    engine = target.engine if target.engine in manifest.engines else manifest.engines[0]
    files = (manifest.files.get(name) for name in manifest.engine_files(engine))
    return sum(file.size for file in files if file is not None)


def _memory(target: Target, manifest: Manifest, memory: int) -> str | None:
    budget, needed = int(target.memory_budget * memory), _weight_bytes(target, manifest)
    if needed <= budget:
        return None
    return (
        f"its weights have {needed / 1e9:.1f} GB, and {budget / 1e9:.1f} GB of this machine's "
        f"{memory / 1e9:.1f} GB are for them; convert with fewer bits, such as --weights int4"
    )
