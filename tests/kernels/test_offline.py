"""Every shipped Triton program compiles for GPUs that are not here, and fits them."""

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux on x86-64")

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
    assert used.stack == 0, "a register is kept in memory"
    assert used.registers <= 255
    assert used.shared <= SHARED[architecture]
    if build.tensor_cores:
        assert used.warp_group_products or used.warp_products
    if build.tensor_cores and build.warp_groups and architecture == 90:
        assert used.warp_group_products
