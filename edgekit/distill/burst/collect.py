"""After a burst: its results become the run, or the student, of an ordinary distillation."""

import json
import shutil
from pathlib import Path

from edgekit.config import load
from edgekit.distill import checkpoint
from edgekit.distill.burst.pieces import CHECKPOINTS, Result, join, newest
from edgekit.distill.burst.train import RESULT
from edgekit.distill.folder import claimed
from edgekit.distill.metrics import read_metrics
from edgekit.distill.plot import draw_losses
from edgekit.errors import TrainingError
from edgekit.staging import staged

__all__ = ["collect"]


def collect(results: Path, student: Path) -> str:
    """Put together what a burst left, as STUDENT.run or, if it came to its end, as STUDENT.

    Args:
        results: the folder that the burst wrote.
        student: the directory of the student.

    Returns:
        How far the training is, in a sentence.

    Raises:
        TrainingError: if something is missing, damaged, of another student, or older than the run.
        BundleError: if the student exists or cannot be written.
    """
    result = _read(results)
    if result.name != student.name:
        raise TrainingError(f"{results}: of the student {result.name}, not {student.name}")
    run = student.with_name(f"{student.name}.run")
    if not result.finished:
        return _collect_run(result, results, run)
    with staged(student, kind="student") as directory:
        for entry in result.files:
            join(entry, results, directory)
        draw_losses(read_metrics(directory), directory / "loss.png")
    shutil.rmtree(run, ignore_errors=True)
    return f"{student}: finished"


def _collect_run(result: Result, results: Path, run: Path) -> str:
    brought = Path(result.files[-1].path).name
    have = newest(run)
    if have is not None and have.name > brought:
        raise TrainingError(f"{run} is further than {results}: {have.name} and {brought}; left")
    with claimed(run, resume=True, force=False):
        for entry in result.files:
            join(entry, results, run)
        for old in sorted(run.glob(CHECKPOINTS))[: -checkpoint.KEPT]:
            old.unlink()
        saved = checkpoint.latest(run)
    if saved is None:
        raise TrainingError(f"{results}: holds no checkpoint")
    return f"{run}: stage {saved.stage}, step {saved.step}, {saved.tokens:,} tokens of the stage"


def _read(results: Path) -> Result:
    try:
        data = json.loads((results / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise TrainingError(
            f"{results / RESULT}: cannot be read ({cause}); copy it again"
        ) from cause
    return load(Result, data, where=str(results / RESULT), error=TrainingError)
