"""What makes a trained model of the glyph world a checkpoint that `edgekit convert` reads.

A LLaVA gets a tokenizer of its 21 words and an image processor. A model with LAWCAT layers becomes
a LLaVA with its eyes and matrices, and a student of that with what the mixers add.

Pictures of this world are floats beyond 0 and 1, which no 8-bit file holds, so the processor leaves
pixels as they are: give `Model.look` ready ones, or transformers arrays.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from edgekit.errors import SourceError
from edgekit.eval.glyphs import world
from edgekit.eval.glyphs.lawcat import LawcatModel
from edgekit.eval.glyphs.model import MODEL, Mixer, load_model, new_model
from edgekit.sources import open_source
from edgekit.sources.student import StudentManifest, write_student

__all__ = ["WORDS", "Checkpoint", "completed", "made"]

BOS, EOS, IMAGE = "<bos>", "<eos>", "<image>"
WORDS = (*(f"glyph{o:02}" for o in range(world.OBJECTS)), BOS, EOS, "and", "with", IMAGE)
TOKENIZER: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": EOS,
    "unk_token": EOS,
    "model_max_length": 128,
    "clean_up_tokenization_spaces": False,
}
PROCESSOR: Mapping[str, Any] = {
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": False,
    "do_resize": False,
    "do_rescale": False,
    "do_normalize": False,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `edgekit convert` is given: a model directory, and a student of it if there is one."""

    source: Path
    student: Path | None


def completed(folder: Path, mixer: Mixer) -> Checkpoint:
    """The checkpoint of a trained model; what it lacks is added, and nothing is trained.

    Args:
        folder: of one seed; its `model` is what training left.
        mixer: of the decoder's layers. With `lawcat`, `base` and `student` come beside `model`.

    Raises:
        SourceError: if there is no trained model.
    """
    if not (folder / MODEL).is_dir():
        raise SourceError(f"{folder / MODEL}: no such model; train it with edgekit.eval.glyphs")
    if mixer == "softmax":
        _write_texts(folder / MODEL)
        return Checkpoint(folder / MODEL, None)
    found = Checkpoint(folder / "base", folder / "student")
    model = load_model(folder / MODEL, mixer)
    made(found.source, lambda work: _base(model).save_pretrained(work))
    _write_texts(found.source)
    made(folder / "student", lambda work: _write_student(model, found.source, work))
    return found


def made(folder: Path, write: Callable[[Path], Any]) -> None:
    """Make a folder, whole or not at all; one that is there stays.

    Args:
        folder: whose parent need not be there.
        write: fills an empty folder.
    """
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    unfinished.rename(folder)


def _write_texts(folder: Path) -> None:
    """Tokenizer and image processor."""
    texts = {
        "tokenizer.json": _tokenizer().to_str(pretty=True),
        "tokenizer_config.json": json.dumps(TOKENIZER, indent=2) + "\n",
        "preprocessor_config.json": json.dumps(PROCESSOR, indent=2) + "\n",
    }
    for name, text in texts.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def _tokenizer() -> Any:
    """One token for each word; a word that this world lacks ends the text, as in GPT-2."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [AddedToken(mark, normalized=False, special=True) for mark in (BOS, EOS, IMAGE)]
    tokenizer.add_special_tokens(marks)
    return tokenizer


def _base(model: LawcatModel) -> Any:
    """A LLaVA with the eyes of `model`, and those of its decoder's tensors that a LLaVA has."""
    llava = new_model(0)
    tensors = {f"model.vision_tower.{n}": t for n, t in model.eyes.state_dict().items()}
    tensors |= {
        f"model.multi_modal_projector.{n}": t for n, t in model.projector.state_dict().items()
    }
    tensors |= {_in_llava(n): t for n, t in model.text.state_dict().items()}
    llava.load_state_dict({name: tensors[name] for name in llava.state_dict()})
    return llava


def _in_llava(name: str) -> str:
    """Where a LLaVA has a tensor of the decoder."""
    inside = name.removeprefix("model.")
    return name if inside == name else f"model.language_model.{inside}"


def _write_student(model: LawcatModel, base: Path, work: Path) -> None:
    source, config = open_source(base), model.text.config
    tensors: Mapping[str, torch.Tensor] = model.text.state_dict()
    manifest = StudentManifest(
        name="glyphs-lawcat",
        base=dict(source.identity),
        mixers=config.mixers,
        lawcat=config.lawcat,
        recipe={"name": "glyphs"},
    )
    added = {name: tensor for name, tensor in tensors.items() if name not in source.weights}
    write_student(work, manifest, added, dtype="float32")
