"""A conversation to a prompt: the model's own Jinja template, in a sandbox."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from edgekit.errors import UsageError

__all__ = ["render"]

# What a template can run into: it is a program that the model's author wrote.
FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks, for training, what the assistant wrote; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    *,
    add_generation_prompt: bool,
) -> str:
    """Apply `template` to `messages`.

    Args:
        template: Jinja source, run in a sandbox: it comes with the model.
        messages: `{"role": ..., "content": ...}` each.
        special: `bos_token` and its like, as the template may name them.
        add_generation_prompt: end with the opening of the assistant's answer.

    Raises:
        UsageError: if a message lacks a key, or the template is faulty or refuses the messages.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UsageError(f"message {i} is {message!r}; each needs a 'role' and a 'content'")
    try:
        return _compiled(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **special
        )
    except FAILURES as cause:
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UsageError(f"the model's chat template refuses these messages: {reason}") from cause


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
