"""Whether a target can run a bundle, before anything is loaded."""

from edgekit.bundle import Manifest
from edgekit.errors import UsageError
from edgekit.targets.schema import Target

__all__ = ["check_serves"]


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
    if target.graph == "dynamic":
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


def _memory(target: Target, manifest: Manifest, memory: int) -> str | None:
    budget = int(target.memory_budget * memory)
    engine = target.engine if target.engine in manifest.engines else manifest.engines[0]
    files = (manifest.files.get(name) for name in manifest.engine_files(engine))
    needed = sum(file.size for file in files if file is not None)
    if needed <= budget:
        return None
    return (
        f"its weights have {needed / 1e9:.1f} GB, and {budget / 1e9:.1f} GB of this machine's "
        f"{memory / 1e9:.1f} GB are for them; convert with fewer bits, such as --weights int4"
    )
