"""The page of ten prompts holds every answer as it came."""

from dataclasses import replace

from benchmarks.ten_prompts import PROMPTS, answer, page

from prosparse.engine.engine import LLM


def test_every_answer_is_on_the_page(tiny_model):
    sparse = answer(LLM(tiny_model(act="relu"), backend="naive"), 4)
    assert len(sparse) == len(PROMPTS) == 10
    sparse[3] = replace(sparse[3], text="one\n\n```\ntwo\n```\n", n_gen=3, finish_reason="stop")
    text = page({"first": sparse, "second": sparse[::-1]}, "the command", "avx2", 4)
    assert "Made by `the command`" in text and max(map(len, text.split("## ")[0].splitlines())) <= 110
    for kind, prompt in PROMPTS.items():
        assert f"## {kind}\n\n**{prompt}**\n\n`first`, " in text
    assert text.count("> one\n>\n> ```\n> two\n> ```\n") == 2
    assert f"`first`, 3 tokens, {sparse[3].sparsity:.1%} inactive" in text
    assert f"| Facts | 4 | {sparse[0].sparsity:.1%} | 4 | {sparse[9].sparsity:.1%} |" in text
    assert text.count("tokens, cut,") == 18
