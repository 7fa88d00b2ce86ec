"""Does the bundle say what the model says? Both engines against PyTorch, on real text.

Each engine reads 512 tokens of `verification.txt` (from Jane Austen's Emma, public domain) and then
writes 32 greedy tokens through the very runtime that a user has. One streamed pass of the torch
reference over text and continuation gives the logits to compare with; a token is "equal" where the
reference would have chosen it too, so 32 of 32 means that the greedy continuations are identical.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from edgekit import runtime
from edgekit.errors import SourceError, VerificationError
from edgekit.models.config import DecoderConfig
from edgekit.models.decoder import streamed_logits
from edgekit.models.weights import WeightStore
from edgekit.runtime.positions import mrope_positions

if TYPE_CHECKING:
    from edgekit.export.vision_files import Side

__all__ = ["Bounds", "Verification", "bounds_for", "verification_tokens", "verify_engine"]

PROMPT_TOKENS = 512
DECODE_STEPS = 32
PICTURE_TOKENS = 32  # of text around the picture
SLICE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What an export may differ by; None is not bounded.

    `max_abs` is widened to `ROUNDING_FACTOR` times the reference's own rounding error where that is
    larger, which is measured against fp64 when it matters: a model that has not been distilled
    meets activations of 30,000 that cancel, and there PyTorch's own fp32 logits are off by 1e-3.

    Attributes:
        max_abs: largest difference of any logit.
        kl: mean Kullback-Leibler divergence from the reference, nats per token.
    """

    max_abs: float | None = None
    kl: float | None = None


ROUNDING_FACTOR = 16.0
# Rounding turns down other heads where two of them look at the picture alike: KL 0.06 in int8 with
# untrained eyes before SmolLM2, and 2 of 9 heads.
SPIN_FACTOR = 4.0
BOUNDS = {
    "fp32": Bounds(max_abs=1e-3, kl=1e-5),
    "fp16": Bounds(kl=1e-3),
    "int8": Bounds(kl=0.05),
    "int4": Bounds(kl=0.5),
}


def bounds_for(weights_format: str, *, trained: bool) -> Bounds:
    """What a conversion may differ by.

    Measured on SmolLM2-135M: mean KL 1e-8 in fp32, 0.004 in int8, 0.3 in int4 (perplexity 33 to
    43); the bounds leave room for other models and catch a broken graph, which scores above 1.
    Before distillation a recurrent model has no meaning that rounding could keep, so only fp32 is
    held to a bound then.
    """
    return BOUNDS[weights_format] if trained or weights_format == "fp32" else Bounds()


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """How far one engine's logits are from the reference.

    Attributes:
        engine: which engine ran.
        prompt_tokens: positions compared in prefill.
        decode_steps: positions compared in single-token decode.
        max_abs: largest |difference| of any logit at any position.
        mean_abs: mean |difference|.
        kl: mean KL(reference || bundle), nats per token.
        argmax_agreement: share of positions with the same most likely token.
        greedy_equal: greedy tokens, of `decode_steps`, that the reference would have chosen too.
        rounding: max |fp32 - fp64| of the reference itself; measured only if `max_abs` asks for it.
        pictures: the same two figures with a picture in the prompt; None: the model reads none.
    """

    engine: str
    prompt_tokens: int
    decode_steps: int
    max_abs: float
    mean_abs: float
    kl: float
    argmax_agreement: float
    greedy_equal: int
    rounding: float | None = None
    pictures: "PictureVerification | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureVerification:
    """How far a bundle is from PyTorch on a prompt with a picture, of random pixels.

    Attributes:
        features: largest |difference| of the picture's embeddings over the largest of them.
        max_abs: largest |difference| of any logit of the prompt.
        kl: mean KL(reference || bundle), nats per token.
    """

    features: float
    max_abs: float
    kl: float


def verification_tokens(encode: Callable[[str], list[int]], limit: int | None) -> np.ndarray:
    """The prompt's token ids `[T]`, at most 512 and leaving room for the continuation.

    Raises:
        SourceError: if the model's context cannot hold even a few tokens.
    """
    text = resources.files("edgekit.export").joinpath("verification.txt").read_text("utf-8")
    room = PROMPT_TOKENS if limit is None else min(PROMPT_TOKENS, limit - DECODE_STEPS - 1)
    if room < 1:
        raise SourceError(f"context of {limit} tokens is too short to verify; use --no-verify")
    ids = np.array(encode(text), dtype=np.int64)
    return np.resize(ids, room)


def verify_engine(
    bundle: Path,
    engine: str,
    ids: np.ndarray,
    config: DecoderConfig,
    weights: WeightStore,
    bounds: Bounds,
    side: "Side | None" = None,
) -> Verification:
    """Run one engine against the reference.

    Args:
        bundle: its directory.
        engine: `openvino` or `onnx`.
        ids: of `verification_tokens`.
        config: the decoder.
        weights: its tensors.
        bounds: what is allowed.
        side: what reads pictures for it, if anything does.

    Raises:
        VerificationError: if a bound is exceeded.
    """
    prefill = _prefill_logits(bundle, engine, ids)
    written, decode = _greedy(bundle, engine, ids)
    sequence = torch.from_numpy(np.concatenate((ids, written)))[None]
    reference = streamed_logits(config, weights, sequence)[0]
    pairs = list(_pairs(reference, prefill, decode, len(ids)))
    chosen = reference[len(ids) - 1 : -1].argmax(dim=-1).numpy()
    result = Verification(
        engine=engine,
        prompt_tokens=len(ids),
        decode_steps=len(written),
        max_abs=max(float((a - b).abs().max()) for a, b in pairs),
        mean_abs=float(np.mean([float((a - b).abs().mean()) for a, b in pairs])),
        kl=_mean([_kl(a, b) for a, b in pairs]),
        argmax_agreement=_mean([(a.argmax(-1) == b.argmax(-1)).float() for a, b in pairs]),
        greedy_equal=int((chosen == written).sum()),
    )
    if bounds.max_abs is not None and result.max_abs > bounds.max_abs:
        exact = streamed_logits(config, weights, sequence, dtype=torch.float64)[0]
        result = replace(result, rounding=float((exact - reference).abs().max()))
    if side is not None:
        seen = _verify_pictures(bundle, engine, ids[:PICTURE_TOKENS], config, weights, side)
        result = replace(result, pictures=seen)
    _judge(result, bounds, SPIN_FACTOR if config.spin is not None else 1.0)
    return result


@torch.no_grad()
def _verify_pictures(
    bundle: Path,
    engine: str,
    ids: np.ndarray,
    config: DecoderConfig,
    weights: WeightStore,
    side: "Side",
) -> PictureVerification:
    """A picture of random pixels in the middle of some text, on the bundle and in PyTorch."""
    model = runtime.load(bundle, engine=engine, logits="all", check=False)
    facts = model.manifest.vision
    assert facts is not None
    seen, features = side.sample(torch.Generator().manual_seed(0))
    pictures = model.look(seen)
    half = len(ids) // 2
    picture = np.full(len(features), facts.image_token_id)
    prompt = np.concatenate((ids[:half], picture, ids[half:]))
    image = torch.from_numpy(prompt == facts.image_token_id)
    table = weights.tensor("model.embed_tokens.weight")
    given = functional.embedding(torch.from_numpy(prompt), table).float() * config.embedding_scale
    given[image] = features
    positions = None
    if facts.merge is not None:
        found, _ = mrope_positions(
            prompt[None], seen.grids, facts.image_token_id, merge=facts.merge
        )
        positions = torch.from_numpy(found)
    reference = streamed_logits(
        config, weights, given[None], image=image[None], positions=positions
    )[0]
    actual = torch.from_numpy(model.session().append(prompt, pictures=pictures)[0])
    shown = torch.from_numpy(pictures.features[:, : config.hidden_size])
    return PictureVerification(
        features=float((shown - features).abs().max() / features.abs().max()),
        max_abs=float((reference - actual).abs().max()),
        kl=float(_kl(reference, actual).mean()),
    )


def _prefill_logits(bundle: Path, engine: str, ids: np.ndarray) -> np.ndarray:
    """Logits of every prompt position `[T, V]`, with the last-position cut undone."""
    model = runtime.load(bundle, engine=engine, logits="all", check=False)
    logits: np.ndarray = model.session().append(ids)[0]
    return logits


def _greedy(bundle: Path, engine: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The continuation `[32]` and logits before and after each token of it `[33, V]`."""
    session = runtime.load(bundle, engine=engine, check=False).session()
    logits = [session.append(ids)[0]]
    written = []
    for _ in range(DECODE_STEPS):
        written.append(int(logits[-1].argmax()))
        logits.append(session.append(np.array(written[-1:]))[0])
    return np.array(written, dtype=np.int64), np.stack(logits)


def _pairs(
    reference: torch.Tensor, prefill: np.ndarray, decode: np.ndarray, prompt: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Reference and bundle logits in slices, so that differences never stand in memory at once."""
    for start in range(0, prompt, SLICE):
        rows = slice(start, min(start + SLICE, prompt))
        yield reference[rows], torch.from_numpy(prefill[rows])
    yield reference[prompt - 1 :], torch.from_numpy(decode)


def _kl(reference: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    p, q = reference.log_softmax(dim=-1), actual.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def _mean(parts: list[torch.Tensor]) -> float:
    return float(torch.cat(parts).mean())


def _judge(result: Verification, bounds: Bounds, spin_factor: float) -> None:
    if not np.isfinite(result.mean_abs):  # a mean keeps a NaN, a maximum may lose it
        raise VerificationError(
            f"{result.engine}: the exported graph gives logits that are not finite"
        )
    allowed = {"max_abs": bounds.max_abs, "kl": bounds.kl}
    if result.rounding is not None and bounds.max_abs is not None:
        allowed["max_abs"] = max(bounds.max_abs, ROUNDING_FACTOR * result.rounding)
    seen = {**allowed, "kl": None if bounds.kl is None else spin_factor * bounds.kl}
    for where, part, limits in (
        ("", result, allowed),
        (" with a picture", result.pictures, seen),
    ):
        for name, bound in limits.items():
            value = 0.0 if part is None else getattr(part, name)
            if bound is not None and not value <= bound:
                raise VerificationError(
                    f"{result.engine}{where}: {name} {value:.2e} exceeds {bound:.1e}; try a wider "
                    "--weights format, or --no-verify to write the bundle all the same"
                )
