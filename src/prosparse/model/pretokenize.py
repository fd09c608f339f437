"""How byte-level BPE models split text before merging, by their GGUF name (`tokenizer.ggml.pre`).

GGUF keeps only a name, so the rules live here, as the `tokenizers` components the original models
ship. An unknown name raises: a wrong split gives fluent but worse text, which nobody notices.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One splitting rule, and the two defaults that llama.cpp ties to its name."""

    splits: Sequence[str | Any]  # regexes whose matches become words of their own, or components
    byte_words: bool = False  # split further with GPT-2's own regex
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token needs no merges
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def build(self) -> pre_tokenizers.PreTokenizer:
        parts = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in self.splits]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.byte_words)
        return pre_tokenizers.Sequence([*parts, byte_level]) if parts else byte_level


def _table() -> dict[str, PreTokenizer]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    smollm = PreTokenizer([digits], byte_words=True)
    gpt2 = PreTokenizer([], byte_words=True)
    llama3 = PreTokenizer([_LLAMA3], ignore_merges=True, add_bos=True)
    deepseek_coder = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, digits]
    return {
        "smollm": smollm,
        "starcoder": smollm,
        "refact": smollm,
        "gpt-2": gpt2,
        "phi-2": gpt2,
        "llama-bpe": llama3,
        "llama3": llama3,
        "llama-v3": llama3,
        "qwen2": PreTokenizer([_QWEN2], nfc=True),
        "tekken": PreTokenizer([_TEKKEN], ignore_merges=True, add_bos=True),
        "deepseek-coder": PreTokenizer(deepseek_coder),
    }


def by_name(name: str | None) -> PreTokenizer:
    """The rule called `name` in GGUF; ValueError lists the known ones."""
    table = _table()
    if name is None or name not in table:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}; known pre-tokenizers are {', '.join(sorted(table))}. "
            "Convert the model again from its Hugging Face folder, or use that folder."
        )
    return table[name]


def name_of(tokenizer: Tokenizer) -> str:
    """The GGUF name of the rule that a Hugging Face tokenizer follows; ValueError if it has none."""
    wanted = (
        _canonical(tokenizer.normalizer),
        _canonical(tokenizer.pre_tokenizer),
        bool(tokenizer.model.ignore_merges),
    )
    for name, rule in _table().items():
        if (_canonical(rule.normalizer()), _canonical(rule.build()), rule.ignore_merges) == wanted:
            return name
    raise ValueError(
        "no GGUF name is known for this tokenizer's way of splitting text: "
        f"normalizer {wanted[0]}, pre-tokenizer {wanted[1]}, ignore_merges {wanted[2]}"
    )


def _canonical(component: Any) -> str:
    """A component as JSON, without what cannot change token ids."""
    if component is None:
        return "null"

    def clean(node: Any) -> Any:
        if isinstance(node, list):
            return [clean(n) for n in node]
        if not isinstance(node, dict):
            return node
        node = {k: clean(v) for k, v in node.items() if k != "trim_offsets"}
        # an empty sequence does nothing, a sequence of one is that one
        for key in ("normalizers", "pretokenizers"):
            if node.get("type") == "Sequence" and key in node and len(node[key]) < 2:
                return node[key][0] if node[key] else None
        return node

    return json.dumps(clean(json.loads(component.__getstate__())), sort_keys=True, ensure_ascii=False)
