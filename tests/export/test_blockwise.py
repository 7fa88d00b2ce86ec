"""The block quantiser: its round trip, its error, and the packed layout that operators read."""

import numpy as np
import pytest

from edgekit.export.blockwise import BLOCK, Bits, dequantise, quantise

SHAPES = [(1, 1), (7, 32), (64, 96), (33, 100), (300, 576)]


def matrix(rows: int, width: int) -> np.ndarray:
    random = np.random.default_rng(rows * width)
    return random.standard_normal((rows, width)).astype(np.float32)


def plain_int4(weight: np.ndarray) -> np.ndarray:
    """Rounded with the scale max|w| / 7 of each block of 32."""
    rows, width = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -width % 32))).reshape(rows, -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 7
    return (np.rint(blocks / scale) * scale).reshape(rows, -1)[:, :width]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_error_stays_within_half_a_step(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    weights = quantise(weight, 8)
    steps = weights.scales.repeat(BLOCK[8], axis=1)[:, : shape[1]]
    assert (np.abs(dequantise(weights) - weight) <= 0.5001 * steps).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_search_is_never_worse_than_the_plain_scale(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    searched, plain = dequantise(quantise(weight, 4)), plain_int4(weight)
    starts = np.arange(0, shape[1], 32)
    errors = [np.add.reduceat((w - weight) ** 2, starts, axis=1) for w in (searched, plain)]
    assert (errors[0] <= 1.02 * errors[1] + 1e-12).all()


def test_int4_search_pays() -> None:
    weight = matrix(512, 512)
    errors = [
        ((w - weight) ** 2).mean() for w in (dequantise(quantise(weight, 4)), plain_int4(weight))
    ]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_on_the_grid_comes_back_exactly(bits: Bits) -> None:
    random = np.random.default_rng(0)
    top = 8 if bits == 4 else 127
    integers = random.integers(-top, top if bits == 4 else top + 1, (40, 128)).astype(np.float32)
    integers[:, :: BLOCK[bits]] = -top
    scales = 2.0 ** random.integers(-6, 2, (40, 128 // BLOCK[bits])).repeat(BLOCK[bits], axis=1)
    weight = (integers * scales).astype(np.float32)
    np.testing.assert_allclose(dequantise(quantise(weight, bits)), weight, rtol=1e-6)


def test_zero_blocks_are_zero() -> None:
    weight = matrix(4, 192)
    weight[1] = 0
    weight[2, 64:128] = 0
    for bits in (4, 8):
        weights = quantise(weight, bits)
        assert not dequantise(weights)[1].any()
        assert not dequantise(weights)[2, 64:128].any()
        assert np.isfinite(weights.scales).all()


def test_chunks_do_not_show() -> None:
    weight = matrix(1200, 576)
    whole = quantise(weight, 4)
    pieces = [quantise(weight[i : i + 100], 4) for i in range(0, 1200, 100)]
    assert np.array_equal(whole.q, np.concatenate([piece.q for piece in pieces]))
    assert np.array_equal(whole.scales, np.concatenate([piece.scales for piece in pieces]))
