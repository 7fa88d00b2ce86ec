"""When an answer about a needle is right."""

import re

__all__ = ["is_right"]


def is_right(task: str, answer: str, output: str, *, ended: bool = True) -> bool | None:
    """Whether an output holds the answer.

    Args:
        task: one of `edgekit.data.needles.KINDS`.
        answer: what was asked for.
        output: what the model said, or the beginning of it.
        ended: whether `output` is all that it said.

    Returns:
        None if the rest of the output decides it.
    """
    wanted = answer.strip()
    if task == "passkey":
        number = re.search(r"\d+" if ended else r"\d+(?=\D)", output, re.ASCII)
        if number:
            return number.group() == wanted
    elif wanted.lower() in output.lower():
        return True
    return False if ended else None
