"""Which form of an op runs: Triton programs on CUDA, plain PyTorch elsewhere; both can be forced.

Forms of an op have one signature:

    reference   the definition, as its formula is written; the oracle of the tests
    torch       the fast form in plain PyTorch, on any device
    triton      the fused programs, on CUDA (or anywhere under Triton's interpreter)

`EDGEKIT_KERNELS=torch` in the environment, or `with forced("torch"):` in the code, replaces `auto`.
The choice is logged once for each op, form and device (logger `edgekit.kernels`).
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import torch

from edgekit.errors import UnsupportedError, UsageError

__all__ = ["VARIABLE", "Form", "choose", "forced", "interpreted"]

Form = Literal["reference", "torch", "triton"]
FORMS: tuple[Form, ...] = get_args(Form)
VARIABLE = "EDGEKIT_KERNELS"
_forced: ContextVar[Form | None] = ContextVar("forced", default=None)
_log = logging.getLogger("edgekit.kernels")


def choose(op: str, x: torch.Tensor, *, fused: bool = True) -> Form:
    """The form of `op` to run on `x`'s device.

    Args:
        op: its name, for the log.
        x: an input.
        fused: whether the Triton form can do what is asked of it; if not, `auto` takes `torch`.

    Raises:
        UsageError: if the environment names a form that does not exist.
        UnsupportedError: if Triton is forced where it cannot run.
    """
    form = _forced.get() or _from_environment()
    if form is None:
        form = "triton" if fused and x.is_cuda and _installed() else "torch"
    elif form == "triton" and not (x.is_cuda or interpreted()):
        raise UnsupportedError(
            f"{op}: its Triton form was forced on {x.device.type}; allowed: a CUDA device, or any "
            "with TRITON_INTERPRET=1"
        )
    _tell(op, form, str(x.device))
    return form


@contextlib.contextmanager
def forced(form: Form) -> Iterator[None]:
    """A block in which every op takes `form`."""
    token = _forced.set(form)
    try:
        yield
    finally:
        _forced.reset(token)


def interpreted() -> bool:
    """Whether Triton runs its programs in Python, so that they need no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _from_environment() -> Form | None:
    name = os.environ.get(VARIABLE, "auto")
    if name == "auto":
        return None
    for form in FORMS:
        if form == name:
            return form
    raise UsageError(f"{VARIABLE}={name} given; allowed: auto, {', '.join(FORMS)}")


@functools.cache
def _installed() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _log.warning("triton is not installed: plain PyTorch runs instead, several times slower")
    return found


@functools.cache
def _tell(op: str, form: Form, device: str) -> None:
    _log.info("%s: %s on %s", op, form, device)
