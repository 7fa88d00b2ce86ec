"""Triton programs compiled for GPUs that are not there, and what the binaries then use.

Neither a GPU nor a driver is needed: Triton's wheel holds ptxas and the disassembler.

    python -m edgekit.kernels.offline            every shipped build, for sm_80, sm_90 and sm_100

A build that keeps registers in memory, or needs more shared memory than there is, is slow on every
GPU of that kind; one without tensor cores is too. Triton must not be in its interpreter.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from edgekit.command import guarded, module_parser, parsed
from edgekit.kernels.launch import FUSED_MULTIPLY_ADD
from edgekit.kernels.transposed import transposed_products
from edgekit.markdown import markdown_table

__all__ = [
    "ARCHITECTURES",
    "WARP_GROUP_ROWS",
    "Build",
    "Resources",
    "compile_offline",
    "main",
    "shipped",
]

ARCHITECTURES = (80, 90, 100)
OPS = ("gla", "conv_feature", "kl_loss", "attention_mse", "spin_attention")
WARP_GROUP_ROWS = 64  # of a product that a group of four warps of sm_90 does at once
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """One program with all that is fixed when it is compiled.

    Attributes:
        name: for tests and tables.
        program: what `triton.jit` returned.
        types: of the arguments that are not constants, as Triton writes them (`*bf16`, `i32`).
        constants: the others.
        warps: per program.
        stages: of its software pipeline.
        architectures: that it is shipped for.
        tensor_cores: whether it multiplies matrices.
        warp_groups: whether these have the 64 rows that the fastest products of sm_90 take.
    """

    name: str
    program: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    architectures: tuple[int, ...] = ARCHITECTURES
    tensor_cores: bool = True
    warp_groups: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a compiled program uses.

    Attributes:
        registers: per thread, 255 at most.
        stack: bytes of memory per thread, for what finds no register.
        shared: bytes of shared memory per program.
        warp_group_products: HGMMA instructions, the tensor cores of sm_90.
        warp_products: HMMA (or sm_100's UTCHMMA) instructions, the tensor cores of the others.
        transposed: results of products that are transposed, which no program may do.
    """

    registers: int
    stack: int
    shared: int
    warp_group_products: int
    warp_products: int
    transposed: tuple[str, ...]


def compile_offline(build: Build, architecture: int) -> Resources:
    """Compile for compute capability `architecture / 10` and read the binary.

    Raises:
        triton.CompilationError: if the program does not compile.
        subprocess.CalledProcessError: if the binary cannot be read.
    """
    names = build.program.arg_names
    signature = {n: build.types.get(n, "constexpr") for n in names}
    source = ASTSource(
        fn=build.program,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in build.constants.items()},
        attrs={(i,): ALIGNED for i, n in enumerate(names) if signature[n].startswith("*")},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, **FUSED_MULTIPLY_ADD}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage, code = _disassembled(compiled.asm["cubin"])
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        shared=compiled.metadata.shared,
        warp_group_products=len(re.findall(r"\bHGMMA", code)),
        warp_products=len(re.findall(r"\b(?:HMMA|UTC\w*MMA|QMMA)", code)),
        transposed=transposed_products(compiled.asm["ttir"]),
    )


def _disassembled(binary: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        code = [str(tools / "nvdisasm"), "-c", file.name]
        usage_text, code_text = (
            subprocess.run(c, check=True, capture_output=True, text=True).stdout
            for c in (usage, code)
        )
    return usage_text, code_text


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


def shipped() -> tuple[Build, ...]:
    """Every build of every op, in the settings that it runs in."""
    modules = (importlib.import_module(f"edgekit.kernels.{op}.fused") for op in OPS)
    return tuple(build for module in modules for build in module.builds())


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print a table.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        0 on success, otherwise the exit code of the error, which is one line on stderr.
    """
    parser = module_parser("edgekit.kernels.offline", __doc__)
    parser.add_argument("--gpu", type=int, choices=ARCHITECTURES, help="default: all of them")
    args, _ = parsed(parser, argv)
    return guarded("offline", lambda: _made(args.gpu))


def _made(only: int | None) -> str:
    rows = []
    for build in shipped():
        for architecture in build.architectures:
            if only not in (None, architecture):
                continue
            used = compile_offline(build, architecture)
            products = used.warp_group_products or used.warp_products
            cells = (used.registers, used.stack, used.shared, products)
            rows.append((build.name, f"sm_{architecture}", *map(str, cells)))
    headers = ("program", "GPU", "registers", "stack, bytes", "shared, bytes", "matrix products")
    return markdown_table(rows, headers)


if __name__ == "__main__":
    sys.exit(main())
