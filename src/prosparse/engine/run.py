"""`prosparse run`: one prompt, one streamed answer."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prosparse import options

if TYPE_CHECKING:
    from prosparse.engine.completion import Chunk, Completion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answers one prompt. A model with a chat template gets the prompt as a user's message, as in "
        "`prosparse chat`; --raw continues the text as it is. The answer goes to stdout, speed to stderr."
    )
    options.add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads it from stdin")
    prompt.add_argument("-f", "--file", type=Path, metavar="FILE", help="file to read the prompt from")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    parser.add_argument("--system", metavar="TEXT", help="system message, for a chat template")
    options.add_sampling(parser)


def main(args: argparse.Namespace) -> int:
    prompt = read_prompt(args)
    sampling = options.sampling(args)
    llm = options.load(args)
    if llm.chat_template and not args.raw:
        system = [{"role": "system", "content": args.system}] if args.system else []
        ids = llm.chat_ids([*system, {"role": "user", "content": prompt}])
    elif args.system:
        raise ValueError("--system needs a model with a chat template, and no --raw")
    else:
        ids = llm.tokenizer.encode(prompt, special=True)
    answer = stream(
        llm.generate(ids, max_tokens=args.n_predict, sampling=sampling, stop=args.stop, stream=True)
    )
    print(summary(answer, llm.mode_reason), file=sys.stderr)
    if args.json:
        options.print_json(fields(answer))
    return 0


def read_prompt(args: argparse.Namespace) -> str:
    if args.file is not None:
        data = args.file.read_bytes()
    elif args.prompt == "-":
        data = sys.stdin.buffer.read()
    else:
        return args.prompt
    return data.decode("utf-8", errors="replace").removesuffix("\n")


def stream(chunks: "Iterable[Chunk]") -> "Completion":
    """Prints chunks as they come, and a line's end; the completion."""
    completion = None
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        completion = chunk.completion
    print(flush=True)
    assert completion is not None, "the last chunk carries the completion"
    return completion


def summary(answer: "Completion", mode_reason: str) -> str:
    """One line on what the answer cost."""
    return (
        f"prompt {answer.n_prompt} tokens, {answer.prompt_tok_s:.1f} tok/s | "
        f"answer {answer.n_gen} tokens, {answer.gen_tok_s:.1f} tok/s | "
        f"sparsity {answer.sparsity:.1%}, {answer.bytes_per_token / 1e6:.1f} MB/token | {mode_reason}"
    )


def fields(answer: "Completion") -> dict[str, object]:
    """The object of `--json`."""
    return {
        "text": answer.text,
        "n_prompt": answer.n_prompt,
        "n_gen": answer.n_gen,
        "prompt_tok_s": round(answer.prompt_tok_s, 2),
        "gen_tok_s": round(answer.gen_tok_s, 2),
        "sparsity": round(answer.sparsity, 4),
        "mode": answer.mode,
        "finish_reason": answer.finish_reason,
        "bytes_per_token": answer.bytes_per_token,
    }
