"""What is measured: anything that reads token ids and answers with logits.

A bundle is read by its engine, without torch; a source or a student by PyTorch, in fp32. B rows, T
tokens of one call, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.bundle import MANIFEST
from edgekit.errors import UsageError
from edgekit.runtime.text import Tokenizer

if TYPE_CHECKING:
    from edgekit.models.config import DecoderConfig
    from edgekit.sources.base import Source

__all__ = ["Floats", "Integers", "Logits", "Reader", "Reading", "open_reader"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Logits = Literal["last", "all"]


class Reading(Protocol):
    """Rows of text in flight, with their state; `edgekit.runtime.Session` is one."""

    def append(self, ids: Integers, mask: Integers | None = None) -> Floats:
        """Read `ids [B, T]`; `mask [B, T]` is 0 for padding, before a row's first token only.

        Returns:
            Logits of the last position `[B, V]`, or of all `[B, T, V]`, as the reader was opened.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """An opened model.

    Attributes:
        name: what the user called it.
        engine: `openvino`, `onnx` or `torch`.
        device: where it runs, in the engine's words.
        identity: JSON-ready; differs wherever a weight differs.
        tokenizer: text to ids and back.
        stops: token ids that end an answer.
        limit: tokens that a sequence may have; None where no layer keeps keys and values.
        start: empty rows of text, as many as asked for.
    """

    name: str
    engine: str
    device: str
    identity: dict[str, Any]
    tokenizer: Tokenizer
    stops: frozenset[int]
    limit: int | None
    start: Callable[[int], Reading]


def open_reader(
    spec: str | Path,
    *,
    logits: Logits,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    base: str | Path | None = None,
) -> Reader:
    """Open a bundle, a student or a source.

    Args:
        spec: a bundle's directory, or what `edgekit.sources.student.open_model` opens.
        logits: which positions a reading answers for.
        engine: of a bundle, `openvino` or `onnx`; None: as `edgekit.runtime.load` chooses.
        device: the engine's device name; for PyTorch `cpu` or `cuda`, None: `cuda` if it is there.
        threads: CPU threads; None: the target's, or else the engine's choice.
        base: a student's teacher, where its manifest does not say where to find it.

    Raises:
        BundleError: if a bundle is damaged.
        EngineError: if its engine or device is missing.
        SourceError: if a source or student is missing or damaged.
        UsageError: for `engine` without a bundle, or `base` without a student.
    """
    if not (Path(spec) / MANIFEST).is_file():
        if engine is not None:
            raise UsageError(
                f"engine {engine} given for {spec}; allowed: with a bundle only, PyTorch reads this"
            )
        return _torch_reader(spec, logits, device, threads, base)
    if base is not None:
        raise UsageError(f"base {base} given for {spec}; allowed: with a student only")
    from edgekit.runtime import load

    model = load(spec, engine=engine, device=device, threads=threads, logits=logits)
    facts = model.manifest.model
    return Reader(
        name=str(spec),
        engine=model.engine,
        device=model.device,
        identity={"kind": "bundle", "fingerprint": model.manifest.fingerprint},
        tokenizer=model.tokenizer,
        stops=frozenset(facts.eos_token_ids),
        limit=facts.context_length,
        start=model.session,
    )


def _torch_reader(
    spec: str | Path,
    logits: Logits,
    device: str | None,
    threads: int | None,
    base: str | Path | None,
) -> Reader:
    from edgekit.eval.torch_reading import load_decoder, start_reading
    from edgekit.sources.student import open_model

    source, config, weights = open_model(spec, base=base)
    decoder, place = load_decoder(config, weights, device=device, threads=threads)
    return Reader(
        name=str(spec),
        engine="torch",
        device=place,
        identity=_identity(spec, source, config),
        tokenizer=Tokenizer(source.directory),
        stops=frozenset(config.eos_token_ids),
        limit=config.context_limit,
        start=start_reading(decoder, logits),
    )


def _identity(spec: str | Path, source: "Source", config: "DecoderConfig") -> dict[str, Any]:
    if config is source.config:
        return source.identity
    from edgekit.sources.student import read_student

    manifest = read_student(spec).manifest
    files = {name: record.sha256 for name, record in manifest.files.items()}
    return {"kind": "student", "name": manifest.name, "files": files, "base": source.identity}
