"""CHAIR and POPE of a model: what it says of pictures, said once, kept, and summed up."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgekit.bundle import MANIFEST
from edgekit.errors import UsageError
from edgekit.eval.chair import Chair, captioned, chair
from edgekit.eval.objects import Vocabulary
from edgekit.eval.pictures import Annotated, Question
from edgekit.eval.pope import Pope, pope
from edgekit.journal import Journal

__all__ = [
    "DESCRIBE",
    "Described",
    "Describer",
    "SaidPictures",
    "chair_of",
    "open_describer",
    "pope_of",
]

Progress = Callable[[str, int, int], None]
DESCRIBE = "Please help me describe the image in detail."


class Describer(Protocol):
    """Answers a question about one picture, greedily."""

    def __call__(self, question: str, image: Path, max_new_tokens: int) -> str:
        """The answer as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """An opened model.

    Attributes:
        name: what the user called it.
        engine: `openvino`, `onnx` or `torch`.
        device: where it runs.
        identity: JSON-ready; differs wherever a weight or SPIN's settings differ.
        say: answers.
    """

    name: str
    engine: str
    device: str
    identity: Mapping[str, Any]
    say: Describer


@dataclass(frozen=True, kw_only=True, slots=True)
class SaidPictures:
    """A measurement and what it rests on."""

    model: str
    task: str
    engine: str
    device: str
    settings: dict[str, Any]
    figures: Chair | Pope


def open_describer(
    spec: str,
    *,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    spin: str | None = None,
) -> Described:
    """Open a bundle on its engine, or a source in PyTorch.

    Args:
        spec: a bundle's directory, or a vision-language source.
        engine: of a bundle.
        device: of a bundle's engine.
        threads: of the CPU.
        spin: settings as for `edgekit.spin.presets.read_spin`; for a source only, since a bundle
            has its own.

    Raises:
        UsageError: if it reads no pictures, or an argument is for the other kind.
    """
    if (Path(spec) / MANIFEST).is_file():
        if spin is not None:
            raise UsageError("--spin given for a bundle, which has its own; convert with --spin")
        return _bundle(spec, engine, device, threads)
    if engine is not None or device is not None:
        raise UsageError(
            "--engine or --device given for a source, which PyTorch runs; leave it out"
        )
    return _source(spec, threads, spin)


def _bundle(spec: str, engine: str | None, device: str | None, threads: int | None) -> Described:
    from edgekit.runtime import load

    model = load(spec, engine=engine, device=device, threads=threads)
    if not model.reads_pictures:
        raise UsageError(f"{spec} reads no pictures; give a vision-language model")

    def say(question: str, image: Path, max_new_tokens: int) -> str:
        if model.tokenizer.has_chat_template:
            question = model.chat_prompt([{"role": "user", "content": question}], images=1)
        return model.generate(question, images=[image], max_new_tokens=max_new_tokens)

    return Described(
        name=spec,
        engine=model.engine,
        device=model.device,
        identity={"bundle": model.manifest.fingerprint},
        say=say,
    )


def _source(spec: str, threads: int | None, spin: str | None) -> Described:
    import torch

    from edgekit.config import dump
    from edgekit.sources import open_source
    from edgekit.sources.picture_model import open_picture_model
    from edgekit.spin import apply
    from edgekit.spin.presets import read_spin

    if threads is not None:
        torch.set_num_threads(threads)
    source = open_source(spec)
    model = open_picture_model(source)
    config = None if spin is None else read_spin(spin)
    if config is not None:
        apply(model.model, config)

    def say(question: str, image: Path, max_new_tokens: int) -> str:
        return model.answer(question, [image], max_new_tokens=max_new_tokens)

    identity = {"source": source.identity["sha256"], "spin": dump(config)}
    return Described(
        name=spec, engine="torch", device=str(model.model.device), identity=identity, say=say
    )


def chair_of(
    model: Described,
    pictures: Sequence[Annotated],
    vocabulary: Vocabulary,
    *,
    question: str = DESCRIBE,
    max_new_tokens: int = 512,
    journal: Path | None = None,
    progress: Progress = lambda *_: None,
) -> SaidPictures:
    """Describe every picture and count what is not there.

    Args:
        model: of `open_describer`.
        pictures: annotated in the vocabulary's terms.
        vocabulary: what objects are called.
        question: what is asked.
        max_new_tokens: of a description.
        journal: where descriptions are kept, to go on from; None: nowhere.
        progress: called with what was done, the number and the count of pictures.

    Raises:
        UsageError: if an object is not in the vocabulary, or the journal has other settings.
    """
    truths = [captioned("", picture.objects, vocabulary).truth for picture in pictures]
    asked = [(question, picture.image) for picture in pictures]
    settings = {"task": "chair", "question": question, "max_new_tokens": max_new_tokens}
    said = _answers(model, asked, settings, journal, progress)
    read = [captioned(s, sorted(truth), vocabulary) for s, truth in zip(said, truths, strict=True)]
    return _result(model, settings, chair(read))


def pope_of(
    model: Described,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 16,
    journal: Path | None = None,
    progress: Progress = lambda *_: None,
) -> SaidPictures:
    """Ask every question and count the right answers; arguments as `chair_of`."""
    asked = [(question.text, question.image) for question in questions]
    settings = {"task": "pope", "max_new_tokens": max_new_tokens}
    said = _answers(model, asked, settings, journal, progress)
    pairs = [(answer, q.there) for answer, q in zip(said, questions, strict=True)]
    return _result(model, settings, pope(pairs))


def _answers(
    model: Described,
    asked: Sequence[tuple[str, Path]],
    settings: Mapping[str, Any],
    journal: Path | None,
    progress: Progress,
) -> list[str]:
    """One answer each, those that the journal has among them."""
    kept = Journal(journal, {**settings, "engine": model.engine, **model.identity})
    for number, (question, image) in enumerate(asked):
        progress(f"{settings['task']}: {image.name}", number, len(asked))
        if number < len(kept.records):
            if kept.records[number]["asked"] != [question, image.name]:
                raise UsageError(
                    f"{journal}: its answer {number + 1} is to another question; give the same "
                    "pictures, another output, or remove the file"
                )
            continue
        answer = model.say(question, image, settings["max_new_tokens"])
        kept.append({"asked": [question, image.name], "answer": answer})
    return [str(record["answer"]) for record in kept.records[: len(asked)]]


def _result(model: Described, settings: dict[str, Any], figures: Chair | Pope) -> SaidPictures:
    return SaidPictures(
        model=model.name,
        task=settings["task"],
        engine=model.engine,
        device=model.device,
        settings=settings,
        figures=figures,
    )
