"""The command `prosparse VERB ...`: each verb is a module with `add_arguments(parser)` and `main(args)`.

Only the chosen verb's module is imported, and it imports what is slow when it runs: help stays instant.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from prosparse import __version__

VERBS = {
    "run": ("prosparse.engine.run", "answer one prompt"),
    "chat": ("prosparse.engine.repl", "talk with a model"),
    "bench": ("prosparse.engine.bench", "measure prefill and decode speed"),
    "inspect": ("prosparse.formats.inspect", "show what is in a model file"),
    "convert": ("prosparse.formats.convert", "convert and quantise between GGUF and Hugging Face folders"),
    "sparsify": ("prosparse.sparsify.run", "make a Swish model sparse by training"),
    "threshold": ("prosparse.sparsify.threshold", "raise the thresholds of a sparse model, without training"),
    "stats": ("prosparse.sparsify.stats", "measure sparsity by layer and corpus, and find hot neurons"),
    "predict": ("prosparse.predictor.run", "train predictors of active neurons, and say what they are worth"),
    "eval": ("prosparse.evaluate.run", "measure accuracy on benchmarks, and perplexity on WikiText-2"),
    "perplexity": ("prosparse.evaluate.perplexity", "measure perplexity on a text"),
    "demo": ("prosparse.engine.demo", "the whole thing on a small real model"),
}
USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; its exit code. A user's mistake (ValueError, OSError) is one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that cannot show a character gets a mark for it, not a crash
        sys.stdout.reconfigure(errors="replace")
    if not argv or argv[0] not in VERBS:
        return _top(argv)
    module = importlib.import_module(VERBS[argv[0]][0])
    parser = argparse.ArgumentParser(prog=f"prosparse {argv[0]}", description=VERBS[argv[0]][1])
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv[1:])
    try:
        code = module.main(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has gone; the interpreter must not try to flush to it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"prosparse {argv[0]}: error: {error}", file=sys.stderr)
        return USER_ERROR


def _top(argv: list[str]) -> int:
    """The command without a known verb: help, version or an error."""
    verbs = "\n".join(f"  {verb:<12}{text}" for verb, (_, text) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="prosparse",
        usage="prosparse VERB [options]",
        description="Activation-sparse language models, from training to tokens per second.",
        epilog=f"verbs:\n{verbs}\n\n`prosparse VERB --help` shows a verb's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prosparse {__version__}")
    parser.add_argument("verb", nargs="?", choices=VERBS, metavar="VERB", help=argparse.SUPPRESS)
    parser.parse_args(argv[:1])
    parser.print_help()
    return 0 if not argv else USER_ERROR
