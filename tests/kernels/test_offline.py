"""Every shipped Triton program compiles for GPUs that are not here, and fits them."""

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64")

import triton
import triton.language as tl

from edgekit.kernels.dispatch import interpreted
from edgekit.kernels.offline import Build, compile_offline, shipped

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")

EVERY_TIME = 90  # builds for the others are left to `make test-slow`
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have


def cases() -> list[object]:
    return [
        pytest.param(
            build,
            architecture,
            id=f"{build.name}, sm_{architecture}",
            marks=() if architecture == EVERY_TIME else pytest.mark.slow,
        )
        for build in shipped()
        for architecture in build.architectures
    ]


@pytest.mark.parametrize(("build", "architecture"), cases())
def test_program_fits_the_gpu(build: Build, architecture: int) -> None:
    used = compile_offline(build, architecture)
    assert not used.transposed, "a product's result is transposed, which Hopper may get wrong"
    assert used.stack == 0, "a register is kept in memory"
    assert used.registers <= 255
    assert used.shared <= SHARED[architecture]
    if build.tensor_cores:
        assert used.warp_group_products or used.warp_products
    if build.tensor_cores and build.warp_groups and architecture == 90:
        assert used.warp_group_products


@triton.jit
def _gradient(
    g, v, q, out, LOOP: tl.constexpr, SAFE: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The product that Triton 3.4 to 3.7.0 get wrong on Hopper, and the form that they do not."""
    at = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    b_g, b_v, b_q = tl.load(g + at), tl.load(v + at), tl.load(q + at)
    b_sum = tl.zeros([C, C], dtype=tl.float32)
    for _ in range(LOOP):
        b_sum += tl.dot(b_v, tl.trans(b_g)) if SAFE else tl.dot(b_g, tl.trans(b_v))
    b_sum = tl.maximum(b_sum, 0.0).to(tl.bfloat16)
    tl.store(out + at, tl.dot(b_sum if SAFE else tl.trans(b_sum), b_q))


@pytest.mark.parametrize("loop", [1, 3])
@pytest.mark.parametrize("safe", [True, False])
def test_a_transposed_result_is_seen(safe: bool, loop: int) -> None:
    types = dict.fromkeys(("g", "v", "q"), "*bf16") | {"out": "*fp32"}
    constants = {"LOOP": loop, "SAFE": safe, "C": 64}
    build = Build(name="toy", program=_gradient, types=types, constants=constants)
    assert bool(compile_offline(build, 90).transposed) is not safe
