"""Greedy answers that every engine must give, token for token.

`python tests/engine/golden.py BACKEND [MODEL]` prints them as JSON; `--write` records them from the numpy
engine in tests/golden/. Run as a program so that PROSPARSE_ISA chooses the kernels.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from prosparse.engine.engine import LLM
from prosparse.engine.sampler import SamplingParams
from prosparse.formats import open_model
from tiny import make_tiny

FOLDER = Path(__file__).parents[1] / "golden"
# seeds whose every choice is clear: see `check_margins`
TINY = {
    "llama-f32-silu": {"type": "F32", "seed": 10},
    "llama-q8_0-relu": {"type": "Q8_0", "act": "relu", "seed": 80},
    "llama-q4_0-relu": {"type": "Q4_0", "act": "relu", "seed": 66},
    "llama-q4_1-gelu": {"type": "Q4_1", "act": "gelu", "seed": 44},
    "llama-q5_1-shiftrelu": {"type": "Q5_1", "act": "shiftrelu_0.1", "seed": 75},
    "qwen2-f16-silu": {"architecture": "qwen2", "type": "F16", "bias": True, "seed": 49},
    "qwen3-bf16-relu": {"architecture": "qwen3", "type": "BF16", "act": "relu", "qk_norm": True, "seed": 31},
    "minicpm-q8_0-fatrelu": {
        "architecture": "minicpm",
        "type": "Q8_0",
        "act": "fatrelu_0.01",
        "embedding_scale": 12.0,
        "residual_scale": 0.7,
        "logit_scale": 0.5,
        "seed": 15,
    },
}
TINY_PROMPT = "Once upon a time"
PROMPT = "What is the capital of France? Then explain in two sentences what a CPU cache is."


def tiny_answer(name: str, backend: str) -> dict[str, object]:
    llm = LLM(make_tiny(**TINY[name]), backend=backend)
    return _fields(llm.generate(TINY_PROMPT, max_tokens=32, sampling=SamplingParams(temperature=0)))


def model_answer(path: str, backend: str) -> dict[str, object]:
    llm = LLM(open_model(path), backend=backend)
    messages = [{"role": "user", "content": PROMPT}]
    return _fields(llm.chat(messages, max_tokens=64, sampling=SamplingParams(temperature=0)))


def check_margins(name: str, answer: dict[str, object]) -> None:
    """The runner-up token must be behind by more than any engine rounds."""
    llm = LLM(make_tiny(**TINY[name]), backend="naive")
    prompt = llm.tokenizer.encode(TINY_PROMPT)
    logits = llm.forward([*prompt, *answer["ids"]], all_logits=True)[len(prompt) - 1 :]
    second, first = np.sort(logits, axis=1)[:, -2:].T
    margin = float((first - second).min())
    if margin < 0.01 * np.abs(logits).max():
        raise ValueError(f"{name}: a choice is as close as {margin:.3f}; take another seed")


def _fields(answer) -> dict[str, object]:
    return {"text": answer.text, "ids": answer.token_ids, "finish_reason": answer.finish_reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=["naive", "cpu"])
    parser.add_argument("model", nargs="?", help="a model file; without one, the tiny models")
    parser.add_argument("--write", metavar="FILE", help="record in tests/golden/FILE")
    args = parser.parse_args()
    if args.model:
        answers = {"chat": model_answer(args.model, args.backend)}
    else:
        answers = {name: tiny_answer(name, args.backend) for name in TINY}
    text = json.dumps(answers, indent=1, ensure_ascii=False)
    if args.write:
        for name, answer in answers.items():
            if name in TINY:
                check_margins(name, answer)
        (FOLDER / args.write).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
