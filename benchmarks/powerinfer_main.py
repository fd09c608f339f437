"""PowerInfer's `main` as a rival: a program of the user's own build, started anew for every round.

Its command line and output are those of commit d3ebd7c, a llama.cpp of November 2023. It times its own
decoding, one token at a time and without sampling, which is what our engine is timed on too.
"""

import math
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = 512  # tokens, main's own default
TRIAL = 16  # tokens a setting is tried on
LAST_LINES = 8
# above the key of the file, so it must not come from the user's shell
THRESHOLD_VARIABLE = "LLAMA_SPARSE_PRED_THRESHOLD"
SPARSE = "Sparse inference will be used"
_EVAL = re.compile(
    r"^llama_print_timings:\s+eval time =\s*([\d.]+) ms /\s*(\d+) runs"
    r"\s+\(\s*[\d.]+ ms per token,\s*[\d.]+ tokens per second\)",
    re.MULTILINE,
)
_THRESHOLD = re.compile(r"sparse_pred_threshold = (-?[\d.]+)")
# what it says of a file that it cannot load, and what that means
TRAPS = (
    ("construction from null", "a tensor is there that it does not ask for"),
    (
        "ffn_down.weight' not found",
        "the magic is GGUF, which makes it look for a dense model: PWRI is needed",
    ),
    ("ffn_down_t.weight' not found", "the magic is PWRI, and the tensors are those of a dense model"),
    ("' not found", "a tensor is missing; a tied output must be written twice"),
    ("has wrong shape", "a tensor has other sizes than the keys say"),
    ("wrong number of tensors", "a tensor is there that it does not ask for"),
    ("key not found in model", "a key that it needs is missing"),
    ("has wrong type", "a key has another number type than it wants: it does not convert u32 and f32"),
    ("unknown model architecture", "it has llama, bamboo, falcon and opt: others must be folded into llama"),
    ("vocab size mismatch", "tokens stand twice in the vocabulary, or are empty"),
    ("GGML_ASSERT", "a tensor has a type that its kernel lacks; norms must be F32"),
    ("invalid magic", "it does not know PWRI: is it llama.cpp's main?"),
    ("unknown argument", "it has other options: is it another version?"),
)


@dataclass(frozen=True, slots=True)
class Timing:
    """Its own figures of one run: tokens that it decoded one by one, and the seconds all of them took."""

    seconds: float
    tokens: int

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens


class PowerInfer:
    """`threshold` is the file's `powerinfer.sparse_threshold`, to which its log is held.

    The faster of mapping the file and reading it (`--no-mmap`) is kept. ValueError for a program that cannot
    be run, that refuses the file, or that does not say how long it took.
    """

    def __init__(self, path: Path, n_threads: int, main: Path, threshold: float, timeout: float) -> None:
        # main runs in a folder of its own, for the logs that it leaves
        self._main, self._path = checked(main).resolve(), path.resolve()
        self._n_threads, self._threshold, self._timeout = n_threads, threshold, timeout
        self._settings: list[str] = []
        self._build: dict[str, str] = {}
        _into_page_cache(path)
        mapped = self._run(TRIAL).per_token
        try:
            read = self._run(TRIAL, ["--no-mmap"]).per_token
        except ValueError:
            # what matters has just run without it
            read = math.inf
        if read < mapped:
            self._settings = ["--no-mmap"]

    def decode(self, tokens: Sequence[int]) -> list[float]:
        """Seconds a token of as many tokens as these, of its own greedy choice: one number, their mean."""
        return [self._run(len(tokens), self._settings).per_token]

    def facts(self) -> dict[str, Any]:
        return {"version": "PowerInfer, main", "settings": self._settings, **self._build}

    def command(self, n: int, more: Sequence[str] = ()) -> list[str]:
        """Greedy, from BOS alone: the prompt is then one token, and is timed as decoding like all others."""
        options: dict[str, Any] = {
            "-m": self._path,
            "-n": n,
            "-t": self._n_threads,
            "-c": max(CONTEXT, n),
            "-p": "",
            "--temp": 0,
            "--repeat-penalty": 1.0,
        }
        pairs = [str(word) for pair in options.items() for word in pair]
        return [str(self._main), *pairs, "--ignore-eos", *more]

    def _run(self, n: int, more: Sequence[str] = ()) -> Timing:
        environment = {k: v for k, v in os.environ.items() if k != THRESHOLD_VARIABLE}
        environment["OMP_NUM_THREADS"] = str(self._n_threads)
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = subprocess.run(
                    self.command(n, more),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=self._timeout,
                    cwd=folder,
                    env=environment,
                )
            except subprocess.TimeoutExpired:
                raise ValueError(
                    f"{self._main} was not done after {self._timeout:g} s: ask for fewer tokens (-n), or "
                    "give it more time (--timeout)"
                ) from None
            except OSError as error:
                raise ValueError(f"{self._main} cannot be started: {error.strerror}") from None
        # its log is on stderr, the text on stdout
        log = f"{done.stdout.decode(errors='replace')}\n{done.stderr.decode(errors='replace')}"
        if done.returncode:
            raise ValueError(refusal(self._main, self._path, done.returncode, log))
        check_log(log, self._threshold)
        self._build = {
            key: found[1].strip()
            for key, pattern in (("build", r"^main: (build = .*)"), ("system_info", r"^system_info: (.*)"))
            if (found := re.search(pattern, log, re.MULTILINE))
        }
        return parse_timing(log, n)


def checked(main: Path) -> Path:
    """The path, if there is a program; else ValueError."""
    if not main.exists():
        raise ValueError(f"there is no {main}: give the path of the `main` that PowerInfer's own build makes")
    if not main.is_file() or not os.access(main, os.X_OK):
        raise ValueError(f"{main} is not executable: give the path of PowerInfer's `main`, not of its folder")
    return main


def parse_timing(log: str, n: int) -> Timing:
    """The timing line of `n` generated tokens. ValueError if it is missing, or of another number of them."""
    found = _EVAL.findall(log)
    if not found:
        raise ValueError(
            "it ended without a line `llama_print_timings: eval time = ... ms / ... runs`, which PowerInfer "
            f"d3ebd7c prints: is it another version? Its last lines:\n{last_lines(log)}"
        )
    milliseconds, tokens = float(found[-1][0]), int(found[-1][1])
    # one less where the prompt was a batch of its own
    if tokens not in (n - 1, n) or not milliseconds:
        raise ValueError(f"it says that it decoded {tokens} tokens in {milliseconds:g} ms, not {n}")
    return Timing(milliseconds / 1e3, tokens)


def check_log(log: str, threshold: float) -> None:
    """ValueError for a run that was not the one meant: dense, on a GPU, or with another threshold."""
    if SPARSE not in log:
        raise ValueError(
            f"it did not say `{SPARSE}`, as PowerInfer does for a file with the magic PWRI: is it another "
            f"program or version? Its last lines:\n{last_lines(log)}"
        )
    if "for GPU acceleration" in log:
        raise ValueError("it is a build for GPUs, and this compares CPUs: give a `main` built without CUDA")
    found = _THRESHOLD.search(log)
    # two digits are printed
    if found and abs(float(found[1]) - threshold) > 0.006:
        raise ValueError(f"it runs with the threshold {found[1]}, the file has {threshold:.2f}")


def refusal(main: Path, path: Path, code: int, log: str) -> str:
    """What to say of a run that failed."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    trap = next((f" ({meaning})" for words, meaning in TRAPS if words in log), "")
    return f"{main} {how} on {path.name}{trap}. Its last lines:\n{last_lines(log)}"


def last_lines(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return "\n".join(f"  {line:.200}" for line in lines[-LAST_LINES:]) or "  (it printed nothing)"


def _into_page_cache(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(2**24):
            pass
