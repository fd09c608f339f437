"""Chat templates: a conversation to the text a model was trained on, rendered as Hugging Face does.

Templates come from model files, so they run in Jinja's sandbox and see nothing but plain data.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template

ROLES = ("system", "user", "assistant", "tool", "developer")

# llama.cpp's choice for models without a template
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MINICPM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<用户>' + message['content'].strip() + '<AI>' }}"
    "{% else %}{{ message['content'].strip() }}{% endif %}"
    "{% endfor %}"
)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation in OpenAI's form, to be encoded with `special=True`.

    `variables` are a template's own switches, such as Qwen3's `enable_thinking`. ValueError for bad
    messages and for what the template itself refuses or cannot do.
    """
    from jinja2 import TemplateError

    if not messages:
        raise ValueError("the conversation is empty; give at least one message")
    try:
        return _compile(template).render(
            messages=[_plain_message(i, message) for i, message in enumerate(messages)],
            tools=None if tools is None else _plain(tools, "tools"),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            **_plain(variables, "the template's variables"),
        )
    except (TemplateError, TypeError, ArithmeticError, LookupError, OverflowError) as error:
        raise ValueError(f"the chat template failed: {error}") from error


def _plain_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as JSON data, its content one text; ValueError says which message is wrong."""
    where = f"message {index}"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise ValueError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"{where} holds parts that are not text; only text is supported")
        content = "".join(part["text"] for part in content)
    elif content is None and not message.get("tool_calls"):
        raise ValueError(f"{where} has no content")
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"the content of {where} is not text")
    return _plain({**message, "content": content}, where)


def _plain(data: Any, where: str) -> Any:
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} must be plain JSON data: {error}") from None


@lru_cache(maxsize=8)
def _compile(template: str) -> "Template":
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's part for training; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012 -- Jinja's own form

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # unlike Jinja's, it does not escape HTML
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
