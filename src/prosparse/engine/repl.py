"""`prosparse chat`: a conversation in the terminal."""

import argparse
import importlib.util
import sys
from typing import TYPE_CHECKING

from prosparse import options
from prosparse.engine.run import fields, stream, summary

if TYPE_CHECKING:
    from prosparse.engine.completion import Completion

HELP = (
    "/clear starts over, /stats shows the last answer's cost, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"A conversation, by the model's own chat template. {HELP}."
    options.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    options.add_sampling(parser)
    parser.set_defaults(n_predict=-1)


def main(args: argparse.Namespace) -> int:
    from prosparse.engine.engine import Context

    sampling = options.sampling(args)
    llm = options.load(args)
    if sys.stdin.isatty():
        if importlib.util.find_spec("readline"):  # line editing and history for input(); not on Windows
            import readline  # noqa: F401
        print(f"{llm.name}, {llm.mode_reason}\n{HELP}\n", file=sys.stderr)

    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages, context = list(opening), Context(llm)
    answers: list[Completion] = []
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                break
            case "/clear":
                messages = list(opening)
                continue
            case "/stats":
                print(summary(answers[-1], llm.mode_reason) if answers else "no answer yet", file=sys.stderr)
                continue
            case "/help":
                print(HELP, file=sys.stderr)
                continue
        messages.append({"role": "user", "content": line})
        try:
            chunks = llm.chat(
                messages,
                max_tokens=args.n_predict,
                sampling=sampling,
                stop=args.stop,
                stream=True,
                context=context,
            )
            answers.append(stream(chunks))
            messages.append({"role": "assistant", "content": answers[-1].text})
        except KeyboardInterrupt:
            print()
            messages.pop()
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            print(f"{error} (/clear starts over)", file=sys.stderr)
            messages.pop()
    if args.json:
        options.print_json({"messages": messages, "answers": [fields(answer) for answer in answers]})
    return 0


def _read_line() -> str | None:
    """The next line a user types; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
