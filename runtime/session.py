"""Token level access to a model: append tokens, read logits, keep and carry the state.

B rows (batch), T tokens of one call, S columns appended so far, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.bundle import Manifest
from edgekit.errors import UsageError
from edgekit.runtime.engine import Array, Engine, Floats, Integers
from edgekit.runtime.pictures import Pictures
from edgekit.runtime.positions import mrope_positions
from edgekit.runtime.state import (
    Snapshot,
    check_snapshot,
    load_snapshot,
    save_snapshot,
    state_bytes,
)

__all__ = ["Session"]

IMAGE_INPUTS = ("spin_image_mask", "token_type_ids")  # a graph has one of them, or none
MASK_COLUMNS = 256  # first capacity of the mask's buffer


class Session:
    """One sequence in flight, or a batch of them, with its own state.

    Sessions of one model share its weights and may run in different threads; one session may not.
    A sequence keeps the adapters that it began with: a session takes those that the model has set
    when it is made and at every `reset`, and a state that is restored holds none.

    Example:
        >>> session = model.session()                               # doctest: +SKIP
        >>> logits = session.append(model.tokenizer.encode("Hello"))   # doctest: +SKIP
        >>> logits.shape                                            # doctest: +SKIP
        (1, 49152)
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        *,
        name: str,
        logits: Literal["last", "all"],
        block: int,
        batch: int,
        adapters: Callable[[], Any] = lambda: None,
    ) -> None:
        """Start `batch` empty sequences; `Model.session` is the usual way here.

        Args:
            engine: the compiled bundle.
            manifest: its manifest.
            name: `openvino` or `onnx`; a saved state is only for one of them.
            logits: what the bundle was compiled to answer.
            block: tokens of one engine call, so that memory does not grow with a prompt.
            batch: B.
            adapters: what the engine lowered of the adapters that a new sequence gets.

        Raises:
            UsageError: if `batch` is below 1.
        """
        if not isinstance(batch, int) or batch < 1:
            raise UsageError(f"batch {batch!r} given; allowed: a whole number, 1 or more")
        self._request = engine.request(batch)
        self._adapters, self._used = adapters, None
        self._take_adapters()
        self._inputs = engine.inputs
        self._manifest = manifest
        self._name = name
        self._logits = logits
        self._block = block
        self._position = 0
        self._mass: Floats | None = None
        self._tokens = np.zeros(batch, dtype=np.int64)
        self._behind = np.zeros_like(self._tokens)
        self._mask = None if manifest.constant_memory else _growing_mask(batch)

    @property
    def batch(self) -> int:
        """B: rows."""
        return len(self._tokens)

    @property
    def position(self) -> int:
        """S: columns appended so far, padding included."""
        return self._position

    @property
    def image_mass(self) -> Floats | None:
        """Share of its attention that each row's last token gave to pictures, fp32 `[B]`.

        0 where a row has seen none; None where the bundle does not say, and before the first append
        of a new or restored sequence.
        """
        return self._mass

    @property
    def state_bytes(self) -> int:
        """Bytes of the state at this position; constant where no layer keeps keys and values."""
        return state_bytes(self._manifest, self._name, self._position, batch=self.batch)

    @property
    def room(self) -> int | None:
        """Tokens that the longest row can still take; None where memory is constant."""
        return min(self.rooms) if self.rooms else None

    @property
    def rooms(self) -> list[int] | None:
        """Tokens that each row can still take; None where memory is constant."""
        limit = self._manifest.model.context_length
        return None if limit is None else (limit - self._tokens).tolist()

    def append(
        self,
        ids: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        pictures: Pictures | None = None,
    ) -> Floats:
        """Read tokens and return the logits that follow them.

        Args:
            ids: integer `[T]` for a batch of one, or `[B, T]`.
            mask: `[B, T]` (or `[T]`) for these columns, 1 for tokens and 0 for padding, which must
                come before a row's first token; None: no padding.
            pictures: what the image tokens among `ids` stand for, row after row; `Model.look` makes
                it. None: image tokens, which a model may write itself, are tokens like others.

        Returns:
            fp32 logits of the last position `[B, V]`, or of all `[B, T, V]` with logits = "all".

        Raises:
            UsageError: for a wrong shape or dtype, ids outside the vocabulary, padding after a
                token, more tokens than the context holds, or another number of pictures'
                embeddings than of image tokens; the session is then as it was.
        """
        tokens = self._checked_ids(ids)
        valid = self._checked_mask(mask, tokens.shape)
        self._check_room(valid)
        contents = self._contents(tokens, pictures)
        positions, behind = self._positions(tokens, valid, pictures)
        blocks: list[Floats] = []
        for columns in self._blocks(contents):
            part = {name: array[:, columns] for name, array in contents.items()}
            part["position_ids"] = positions[..., columns]
            logits = self._step(part, valid[:, columns])
            if self._logits == "last":
                blocks = []
            blocks.append(logits)
        self._behind = behind
        if self._logits == "last":
            return blocks[0][:, -1]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)

    def next_logits(
        self,
        ids: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        pictures: Pictures | None = None,
    ) -> Floats:
        """`append`, and the logits of the last position alone, `[B, V]`, however it was opened."""
        logits = self.append(ids, mask, pictures)
        return logits if self._logits == "last" else logits[:, -1]

    def _blocks(self, contents: Mapping[str, Array]) -> Iterator[slice]:
        """Columns of each engine call; no picture is cut, since its tokens may see each other."""
        length, start = next(iter(contents.values())).shape[1], 0
        image = contents.get(IMAGE_INPUTS[0], np.zeros((1, length), np.int64))
        inside = (image[:, :-1] & image[:, 1:]).max(
            axis=0, initial=0
        )  # between a column and the next
        while start < length:
            end = min(start + self._block, length)
            while end < length and inside[end - 1]:
                end += 1
            yield slice(start, end)
            start = end

    def _contents(self, tokens: Integers, pictures: Pictures | None) -> dict[str, Array]:
        """What the graph reads of a call: token ids, or embeddings and where pictures lie."""
        facts = self._manifest.vision
        if facts is None:
            if pictures is not None:
                raise UsageError("pictures given to a model that reads text alone; leave them out")
            return {"input_ids": tokens}
        rows, places = self._request.embed(tokens), np.zeros(tokens.shape, dtype=bool)
        if pictures is not None:
            places = tokens == facts.image_token_id
            if len(pictures.features) != places.sum():
                raise UsageError(
                    f"{len(pictures.features)} embeddings of pictures given for {places.sum()} "
                    "image tokens; allowed: as many"
                )
            rows[places] = pictures.features
        image = places.astype(np.int64)
        return {"inputs_embeds": rows, **dict.fromkeys(IMAGE_INPUTS, image)}

    def _positions(
        self, tokens: Integers, valid: Integers, pictures: Pictures | None
    ) -> tuple[Integers, Integers]:
        """`position_ids` of a call, and how far behind the count they are after it."""
        facts = self._manifest.vision
        if facts is None or facts.merge is None:
            steps = self._tokens[:, None] + valid.cumsum(axis=1) - 1
            return np.maximum(steps, 0), self._behind
        seen = Pictures(np.zeros((0, 0), np.float32)) if pictures is None else pictures
        return mrope_positions(
            np.zeros_like(tokens) - 1 if pictures is None else tokens,
            seen.grids,
            facts.image_token_id,
            merge=facts.merge,
            mask=valid,
            seen=self._tokens,
            delta=self._behind,
        )

    def _step(self, contents: Mapping[str, Array], valid: Integers) -> Floats:
        """One engine call; position and mask move only when it succeeded."""
        after = self._position + valid.shape[1]
        feeds = {**contents, "attention_mask": self._visible(valid, after)}
        logits = self._request.infer(
            {n: np.ascontiguousarray(a) for n, a in feeds.items() if n in self._inputs}
        )
        mass = self._request.image_mass
        self._mass = None if mass is None else mass[:, 0]
        self._position = after
        self._tokens = self._tokens + valid.sum(axis=1)
        return logits

    def _visible(self, valid: Integers, after: int) -> Integers:
        """The attention mask: all columns `[B, S]`, or these alone where no layer looks back."""
        if self._mask is None:
            return valid
        if after > self._mask.shape[1]:
            grown = _growing_mask(self.batch, 2 * after)
            grown[:, : self._position] = self._mask[:, : self._position]
            self._mask = grown
        self._mask[:, self._position : after] = valid
        return self._mask[:, :after]

    def reset(self) -> None:
        """Forget everything; the next append starts anew, with the model's adapters of now."""
        self._request.reset(self.batch)
        self._take_adapters()
        self._position, self._mass = 0, None
        self._tokens = np.zeros(self.batch, dtype=np.int64)
        self._behind = np.zeros_like(self._tokens)

    def _take_adapters(self) -> None:
        wanted = self._adapters()
        if wanted is not self._used:
            self._request.use_adapters(wanted)
            self._used = wanted

    def reorder(self, rows: npt.ArrayLike | Sequence[int]) -> None:
        """Make row i what row `rows[i]` was; repeating or leaving out rows changes the batch.

        Raises:
            UsageError: if `rows` is empty or names a row that is not there.
        """
        index = np.asarray(rows)
        if index.ndim != 1 or not index.size or not np.issubdtype(index.dtype, np.integer):
            raise UsageError(f"rows {rows!r} given; allowed: a list of one row number or more")
        if index.min() < 0 or index.max() >= self.batch:
            raise UsageError(f"rows {index.tolist()} given; allowed: 0 to {self.batch - 1}")
        index = index.astype(np.int64)
        if self._position:
            self._request.reorder(index)
        else:
            self._request.reset(len(index))
        self._tokens, self._behind = self._tokens[index], self._behind[index]
        self._mass = None if self._mass is None else self._mass[index]
        self._mask = None if self._mask is None else self._mask[index]

    def snapshot(self) -> Snapshot:
        """The state as it is now, a bit-exact copy that later calls do not touch."""
        return Snapshot(
            fingerprint=self._manifest.fingerprint,
            engine=self._name,
            position=self._position,
            tokens=self._tokens.copy(),
            mask=None if self._mask is None else self._mask[:, : self._position].copy(),
            states=self._request.read_states() if self._position else {},
            behind=self._behind.copy(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from `snapshot`, of this session or of another with as many rows.

        Raises:
            BundleError: if it comes from another bundle or engine.
            UsageError: if it has another number of rows.
        """
        check_snapshot(snapshot, self._manifest, self._name, where="snapshot")
        self._check_batch(snapshot, "the snapshot")
        self._adopt(snapshot)

    def save(self, path: Path | str) -> None:
        """Write the state to one safetensors file.

        Raises:
            UsageError: if the file cannot be written.
        """
        save_snapshot(self.snapshot(), Path(path))

    def load(self, path: Path | str) -> "Session":
        """Go on from a saved state; returns this session.

        Raises:
            BundleError: if the file is missing, damaged, or of another bundle or engine.
            UsageError: if it has another number of rows.
        """
        snapshot = load_snapshot(Path(path), self._manifest, self._name)
        self._check_batch(snapshot, str(path))
        self._adopt(snapshot)
        return self

    def _check_batch(self, snapshot: Snapshot, where: str) -> None:
        if snapshot.batch != self.batch:
            raise UsageError(
                f"{where} has {snapshot.batch} rows, this session {self.batch}; "
                f"make one with model.session(batch={snapshot.batch})"
            )

    def _adopt(self, snapshot: Snapshot) -> None:
        if snapshot.position:
            self._request.write_states(snapshot.states)
        else:
            self._request.reset(self.batch)
        self._position, self._mass = snapshot.position, None
        self._tokens, self._behind = snapshot.tokens.copy(), snapshot.behind.copy()
        if snapshot.mask is not None:
            self._mask = snapshot.mask.copy()

    def _checked_ids(self, ids: npt.ArrayLike) -> Integers:
        array = np.asarray(ids)
        array = array[None] if array.ndim == 1 else array
        if array.ndim != 2 or array.shape[0] != self.batch:
            raise UsageError(
                f"ids of shape {np.shape(ids)} given; allowed: [{self.batch}, T]"
                + (" or [T]" if self.batch == 1 else "")
            )
        if not array.size:
            raise UsageError("no ids given; append needs at least one token")
        if not np.issubdtype(array.dtype, np.integer):
            raise UsageError(f"ids of dtype {array.dtype} given; allowed: integers")
        vocab = self._manifest.model.vocab_size
        if array.min() < 0 or array.max() >= vocab:
            odd = int(array.min() if array.min() < 0 else array.max())
            raise UsageError(f"token id {odd} is outside the vocabulary; allowed: 0 to {vocab - 1}")
        return array.astype(np.int64, copy=False)

    def _checked_mask(self, mask: npt.ArrayLike | None, shape: tuple[int, ...]) -> Integers:
        if mask is None:
            return np.ones(shape, dtype=np.int64)
        array: npt.NDArray[Any] = np.asarray(mask)
        array = array[None] if array.ndim == 1 else array
        if array.shape != shape:
            raise UsageError(
                f"a mask of shape {np.shape(mask)} given for ids of shape {shape}; "
                "they must be equal: the mask is for the columns of this call alone"
            )
        if array.dtype.kind not in "biu" or not np.isin(array, (0, 1)).all():
            raise UsageError(f"a mask of {array.dtype} given; allowed: whole numbers, 0 and 1")
        valid = array.astype(np.int64)
        # A convolution reads its padding as zero inputs, which only an empty history is, too.
        begun = np.concatenate(((self._tokens > 0)[:, None].astype(np.int64), valid), axis=1)
        if (np.diff(begun, axis=1) < 0).any():
            raise UsageError(
                "a mask with padding after a token given; allowed: padding before a row's first "
                "token only, so append rows of different lengths left-padded in the first call"
            )
        return valid

    def _check_room(self, valid: Integers) -> None:
        """Refuse before anything is computed what the context cannot hold."""
        limit = self._manifest.model.context_length
        needed = int((self._tokens + valid.sum(axis=1)).max())
        if limit is not None and needed > limit:
            raise UsageError(
                f"{needed} tokens given; this model's softmax layers see at most {limit}: "
                "shorten the prompt, or convert with --mixer lawcat, which has no limit"
            )


def _growing_mask(batch: int, columns: int = MASK_COLUMNS) -> Integers:
    return np.zeros((batch, columns), dtype=np.int64)
