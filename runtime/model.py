"""An opened bundle: text in, text out, and sessions for those who count in tokens."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np

from edgekit.bundle import Manifest
from edgekit.errors import UsageError
from edgekit.runtime.adapters import AdapterInfo, Adapters
from edgekit.runtime.engine import Engine, EngineSettings, Integers, OperatorTime
from edgekit.runtime.generation import Generation, GenerationStats, ScoredPiece
from edgekit.runtime.images import Picture
from edgekit.runtime.pictures import Pictures
from edgekit.runtime.sampling import GenerationOptions, GenerationSettings
from edgekit.runtime.session import Session
from edgekit.runtime.text import Tokenizer
from edgekit.runtime.vision import Seen, Vision

__all__ = ["Model"]


class Model:
    """A loaded bundle; `edgekit.runtime.load` makes it.

    Attributes:
        manifest: what `edgekit.json` says.
        engine: `openvino` or `onnx`.
        device: the engine's device name.
        graph: OpenVINO's form of the decoder, `dynamic`, `stepped` or `static`.
        tokenizer: text to ids and back.
        load_seconds: from the call of `load` to a model ready to run, compilation included.
        compile_seconds: the engine's part of it.
        model_bytes: size of the engine's graph and weights on disk.
        last_stats: what the last finished generation took; None before the first.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: str,
        compiled: Engine,
        settings: EngineSettings,
        *,
        tokenizer: Tokenizer,
        vision: Vision | None,
        block: int,
        load_seconds: float,
    ) -> None:
        self.manifest, self.engine, self.device = manifest, engine, settings.device
        self.graph = settings.graph
        self.tokenizer, self._vision = tokenizer, vision
        self.load_seconds, self.compile_seconds = load_seconds, compiled.compile_seconds
        self.model_bytes = sum(
            manifest.files[file].size
            for file in manifest.engine_files(engine)
            if file in manifest.files
        )
        self.last_stats: GenerationStats | None = None
        self._compiled, self._logits, self._block = compiled, settings.logits, block
        self._profiled = settings.profiling
        self._adapters = Adapters(manifest.adapter_slots)
        self._active: tuple[dict[str, float], Any] = ({}, compiled.lowered({}))

    def session(self, batch: int = 1) -> Session:
        """A new session of `batch` rows; all sessions share this model's weights.

        Raises:
            UsageError: if `batch` is below 1.
        """
        return Session(
            self._compiled,
            self.manifest,
            name=self.engine,
            logits=self._logits,
            block=self._block,
            batch=batch,
            adapters=lambda: self._active[1],
        )

    @property
    def calls(self) -> int:
        """Calls of the decoder's graph so far, where it was loaded with `profiling`; else 0."""
        return self._compiled.calls

    def operator_times(self) -> dict[str, OperatorTime]:
        """Of a mean call, what the operators of each type took; ask once, at the end.

        Raises:
            UsageError: if the model was not loaded with `profiling`.
        """
        if not self._profiled:
            raise UsageError("this model takes no times: load it with profiling=True")
        return self._compiled.operator_times()

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name: how many modules matched, rank, bytes."""
        return self._adapters.infos

    @property
    def active_adapters(self) -> dict[str, float]:
        """What `set_adapters` set last: weights by name."""
        return dict(self._active[0])

    def load_adapter(
        self, path: Path | str, name: str | None = None, *, over: Path | str | None = None
    ) -> str:
        """Read an adapter that PEFT saved, and check it against the bundle's slots; sets nothing.

        Args:
            path: its directory; or a vector pack, a file, with `over`.
            name: what to call it; None: as the directory or the file is called.
            over: a loaded adapter's name, or a directory, whose projections the vector pack uses.

        Returns:
            The name.

        Warns:
            UserWarning: if some of its modules have no slot.

        Raises:
            AdapterError: if the bundle has no slots, or the adapter cannot be read, is no low-rank
                difference, is of another model, or none of its modules has a slot.
            UsageError: if the name is taken.
        """
        return self._adapters.load(Path(path), name, over)

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Choose the adapters of the sequences that begin from now on.

        Sequences under way keep theirs, so this may be called while other threads generate; a
        session takes the change at its next `reset`.

        Args:
            weights: by name, of loaded adapters, which are added up exactly; 0 leaves one out, and
                an empty mapping is the base model, bit for bit.

        Raises:
            UsageError: for an adapter that is not loaded, or a weight that is not finite.
        """
        lowered = self._compiled.lowered(self._adapters.combined(weights))
        self._active = ({name: float(w) for name, w in weights.items() if w}, lowered)

    def unload_adapter(self, name: str) -> None:
        """Forget a loaded adapter.

        Raises:
            UsageError: if there is none of this name, or it is set.
        """
        if name in self._active[0]:
            raise UsageError(f"adapter {name!r} is set; set_adapters without it first")
        self._adapters.unload(name)

    @property
    def reads_pictures(self) -> bool:
        """Whether prompts may have pictures."""
        return self._vision is not None

    def look(self, pictures: "Sequence[Picture] | Seen") -> Pictures:
        """What the decoder reads of pictures, for `Session.append`.

        Args:
            pictures: files, their bytes, or PIL images; or pixels that are ready.

        Raises:
            UsageError: if the model reads no pictures, or one of them cannot be read.
            EngineError: if Pillow is not installed.
        """
        vision = self._seeing()
        return vision.look(pictures if isinstance(pictures, Seen) else vision.seen(pictures))

    @overload
    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] = (),
        **settings: Unpack[GenerationSettings],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        *,
        images: Sequence[Sequence[Picture]] = (),
        **settings: Unpack[GenerationSettings],
    ) -> list[str]: ...
    def generate(
        self,
        prompt: str | list[str],
        *,
        images: Sequence[Any] = (),
        **settings: Unpack[GenerationSettings],
    ) -> str | list[str]:
        """Continue one prompt, or several side by side.

        Args:
            prompt: a text, or a list of texts of any lengths.
            images: pictures of the prompt, for the placeholders in it, or before it where it has
                none; for a list of prompts, a list of pictures for each.
            settings: fields of `GenerationOptions`, by name.

        Returns:
            The new text of each prompt, without the prompt.

        Raises:
            UsageError: for an unknown option, a value outside its range, an empty prompt, one
                longer than the model's context, or pictures that do not fit.
        """
        options = GenerationOptions.of(settings)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        pictures = [images] if isinstance(prompt, str) else list(images) or [()] * len(prompts)
        if not prompts:
            raise UsageError("no prompt given; give one text or more")
        if len(pictures) != len(prompts):
            raise UsageError(
                f"pictures for {len(pictures)} prompts given, and {len(prompts)} prompts; "
                "allowed: a list for each"
            )
        if options.num_beams > 1:
            pairs = zip(prompts, pictures, strict=True)
            texts = [self._best_beam(text, options, seen) for text, seen in pairs]
        else:
            texts = self._continue(prompts, options, pictures)
        return texts[0] if isinstance(prompt, str) else texts

    @overload
    def stream(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] = (),
        with_scores: Literal[False] = False,
        **settings: Unpack[GenerationSettings],
    ) -> Iterator[str]: ...
    @overload
    def stream(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] = (),
        with_scores: Literal[True],
        **settings: Unpack[GenerationSettings],
    ) -> Iterator[ScoredPiece]: ...
    def stream(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] = (),
        with_scores: bool = False,
        **settings: Unpack[GenerationSettings],
    ) -> Iterator[str] | Iterator[ScoredPiece]:
        """Continue a prompt piece by piece; the pieces join to what `generate` returns.

        Args:
            prompt: a text.
            images: its pictures; see `generate`.
            with_scores: yield `ScoredPiece`, which says how far the model looked at the pictures.
            settings: fields of `GenerationOptions`, by name; `num_beams` must be 1.

        Raises:
            UsageError: as `generate`, or if the bundle does not say what `with_scores` asks for,
                before the first piece.
        """
        facts = self.manifest.vision
        if with_scores and not (facts is not None and facts.image_mass):
            raise UsageError(
                "with_scores given, but this bundle does not say how far it looks at pictures; "
                "convert a vision-language model with --spin-scores"
            )
        options = GenerationOptions.of(settings)
        if options.num_beams > 1:
            raise UsageError(
                "beam search cannot stream: its text is not certain before the end; use generate"
            )
        generation = self._generation([prompt], options, [images])
        if with_scores:
            return self._scored_pieces(generation)
        return (piece.text for piece in self._scored_pieces(generation))

    def chat_prompt(
        self,
        messages: Sequence[dict[str, str]],
        *,
        images: int = 0,
        add_generation_prompt: bool = True,
    ) -> str:
        """A conversation as a prompt, by the model's own template; see `Tokenizer.chat_prompt`.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            images: how many pictures the first message of the user has.
            add_generation_prompt: end with the opening of the assistant's answer.
        """

        def render(given: Sequence[Mapping[str, Any]]) -> str:
            return self.tokenizer.chat_prompt(given, add_generation_prompt=add_generation_prompt)

        if self._vision is None and not images:
            return render(messages)
        return self._seeing().chat_prompt(render, messages, images)

    def _seeing(self) -> Vision:
        if self._vision is None:
            raise UsageError("pictures given to a model that reads text alone; leave them out")
        return self._vision

    def _generation(
        self,
        texts: Sequence[str],
        options: GenerationOptions,
        pictures: Sequence[Sequence[Picture]],
    ) -> Generation:
        prompts, seen = self._prompts(texts, pictures)
        facts = self.manifest.model
        return Generation(
            self.session(len(prompts)),
            self.tokenizer,
            prompts,
            options,
            facts.eos_token_ids,
            facts.vocab_size,
            pictures=None if seen is None else self._seeing().look(seen),
        )

    def _prompts(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Picture]]
    ) -> tuple[list[Integers], Seen | None]:
        """Token ids of prompts, image tokens among them, and the pixels of all pictures."""
        seen = None
        if any(pictures):
            seen = self._seeing().seen([picture for row in pictures for picture in row])
        if self._vision is not None:
            grids = np.zeros((0, 3), np.int64) if seen is None else seen.grids
            ends = np.cumsum([len(row) for row in pictures])[:-1]
            parts = zip(texts, np.split(grids, ends), strict=True)
            texts = [self._vision.prompt(text, part) for text, part in parts]
        return [self.tokenizer.encode_prompt(text) for text in texts], seen

    def _scored_pieces(self, generation: Generation) -> Iterator[ScoredPiece]:
        for _, piece in generation.scored_pieces():
            yield piece
        self.last_stats = generation.stats

    def _continue(
        self,
        texts: Sequence[str],
        options: GenerationOptions,
        pictures: Sequence[Sequence[Picture]],
    ) -> list[str]:
        generation = self._generation(texts, options, pictures)
        rows: list[list[str]] = [[] for _ in texts]
        for row, piece in generation.pieces():
            rows[row].append(piece)
        self.last_stats = generation.stats
        return ["".join(pieces) for pieces in rows]

    def _best_beam(self, text: str, options: GenerationOptions, pictures: Sequence[Picture]) -> str:
        generation = self._generation([text], options, [pictures])
        found = generation.best_beam()
        self.last_stats = generation.stats
        return found
