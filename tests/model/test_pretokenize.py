import pytest
from tokenizers import Tokenizer, models, normalizers

from prosparse.model import pretokenize


def words(name: str, text: str) -> list[str]:
    rule = pretokenize.by_name(name)
    if normalizer := rule.normalizer():
        text = normalizer.normalize_str(text)
    return [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in rule.build().pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["It", "'s", " 2024", "!!", " WE", "'", "LL", "  ", " go", "\n", "\n", "x"]),
        (
            "smollm",
            ["It", "'s", " ", "2", "0", "2", "4", "!!", " WE", "'", "LL", "  ", " go", "\n", "\n", "x"],
        ),
        ("llama-bpe", ["It", "'s", " ", "202", "4", "!!", " WE", "'LL", "  ", " go", "\n\n", "x"]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "4", "!!", " WE", "'LL", "  ", " go", "\n\n", "x"]),
        ("tekken", ["It", "'s", " ", "2", "0", "2", "4", "!!", " WE", "'LL", "  ", " go", "\n\n", "x"]),
        ("deepseek-coder", ["It", "'", "s", " ", "2", "0", "2", "4", "!!", " WE", "'", "LL", "  ", " go"]),
    ],
)
def test_words(name: str, expected: list[str]) -> None:
    newlines = ["\n", "\n", "x"] if name.startswith("deepseek") else []
    assert words(name, "It's 2024!! WE'LL   go\n\nx") == expected + newlines


def test_tekken_splits_at_case_changes() -> None:
    assert words("tekken", "HTTPServer camelCase") == ["HTTPServer", " camel", "Case"]
    assert words("llama-bpe", "HTTPServer camelCase") == ["HTTPServer", " camelCase"]


def test_qwen2_composes_characters() -> None:
    assert words("qwen2", "e\u0301") == words("qwen2", "\u00e9")
    assert words("llama-bpe", "e\u0301") != words("llama-bpe", "\u00e9")


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "deepseek-coder"])
def test_name_is_found_again(name: str) -> None:
    rule = pretokenize.by_name(name)
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule.ignore_merges))
    tokenizer.pre_tokenizer = rule.build()
    if normalizer := rule.normalizer():
        tokenizer.normalizer = normalizer
    assert pretokenize.name_of(tokenizer) == name
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="Lowercase"):
        pretokenize.name_of(tokenizer)


def test_empty_normalizer_is_none() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pretokenize.by_name("gpt-2").build()
    assert pretokenize.name_of(tokenizer) == "gpt-2"


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="'new-bpe'; known pre-tokenizers are deepseek-coder"):
        pretokenize.by_name("new-bpe")
