from datetime import datetime
from typing import Any

import pytest

from prosparse.model.chat import CHATML, MINICPM, render

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 2 < 3 & 'x'? "},
    {"role": "assistant", "content": "True."},
    {"role": "user", "content": "Why?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a <b> é"}}]

# Shaped like the templates in use: LLaMA 2's and 3's and Qwen's features, in a few lines each.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% set messages = messages[1:] %}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must alternate') }}
{% endif %}
    {%- if message.role == 'user' %}{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""
LLAMA3 = """{{- bos_token }}
{%- if not date is defined %}{% set date = 'today' %}{% endif %}
{%- for m in messages %}{%- if m.role == 'system' %}{% continue %}{% endif %}
<|start|>{{ m.role }}
{% generation %}{{ m.content | trim }}{% endgeneration %}<|eot_id|>
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %} {{ date }}"""
QWEN = """{%- set ns = namespace(first=true) %}{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2) }}{% endfor %}{% endif %}
{%- for message in messages %}{% if ns.first %}{{ 'FIRST' }}{% set ns.first = false %}{% endif %}
{%- if message.tool_calls %}{{ message.tool_calls[0].function.arguments | tojson }}{% endif %}
{{- '<|im_start|>' ~ message.role ~ (message.content or '') }}{% endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"""


def test_chatml() -> None:
    assert render(CHATML, CONVERSATION[:2]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n What is 2 < 3 & 'x'? <|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, CONVERSATION[1:2], add_generation_prompt=False).endswith("<|im_end|>\n")


def test_minicpm() -> None:
    assert render(MINICPM, [{"role": "user", "content": "你好 "}]) == "<用户>你好<AI>"
    assert render(MINICPM, CONVERSATION) == "Be brief.<用户>What is 2 < 3 & 'x'?<AI>True.<用户>Why?<AI>"


def test_smollm2(smollm2_metadata: dict[str, Any]) -> None:
    template = smollm2_metadata["tokenizer.chat_template"]
    assert render(template, [{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "SmolLM" not in render(template, CONVERSATION)


@pytest.mark.parametrize("template", [CHATML, MINICPM, LLAMA2, LLAMA3, QWEN])
@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "enable_thinking": False}, {"date": "1 May"}])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(template: str, options: dict[str, Any], prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    keys = {"bos_token": "<s>", "eos_token": "</s>", **options}
    rendered, _ = utils.render_jinja_template(
        conversations=[CONVERSATION], chat_template=template, add_generation_prompt=prompt, **keys
    )
    assert render(template, CONVERSATION, add_generation_prompt=prompt, **keys) == rendered[0]


def test_tool_calls_need_no_content() -> None:
    call = {"function": {"name": "add", "arguments": {"a": "<é>"}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert '{"a": "<é>"}<|im_start|>assistant' in render(QWEN, [message])


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(MINICPM, [{"role": "user", "content": parts}]) == "<用户>ab<AI>"


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}", CONVERSATION) in {str(datetime.now().year + i) for i in (0, -1)}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ([{"role": "robot", "content": "x"}], "message 0 has the role 'robot'; the roles are system, user"),
        ([{"content": "x"}], "has the role None"),
        (["hello"], "has the role 'hello'"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": 5}], "not text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "only text is supported"),
        ([{"role": "user", "content": "x", "extra": object()}], "plain JSON"),
        ([{"role": "assistant", "content": "x"}], "failed: roles must alternate"),
    ],
)
def test_bad_messages(messages: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(LLAMA2, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ nothing.at.all }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_bad_templates(template: str) -> None:
    with pytest.raises(ValueError, match="chat template failed"):
        render(template, CONVERSATION)
