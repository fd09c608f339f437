"""Peak memory against file + KV cache, and what a user waits for: loading, importing, the help text.

    python -m benchmarks.memory [-m MODEL ...]

Every figure is of a fresh process with the file in the page cache, the best of `--runs`. Writes
benchmarks/results/memory_<machine>_<yyyymm>.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cpu_decode import RESULTS
from prosparse.formats import open_model
from prosparse.formats.open import find
from prosparse.model.config import ModelConfig

N_CTX = 512  # the cache is filled to the last token: only what is written is resident
# resident memory in KB: VmHWM is the peak, mapped file pages included
CHILD = """
import json, re, sys, time
import numpy, prosparse
from prosparse import _core
def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = kilobytes("VmRSS")
start = time.perf_counter()
llm = prosparse.load(sys.argv[1], n_ctx=int(sys.argv[2]))
load_s = time.perf_counter() - start
after = kilobytes("VmHWM")
cache = llm.new_cache()
llm.forward(list(range(3, 3 + llm.n_ctx - 8)), cache)
for token in range(8):
    llm.forward([token], cache)
print(json.dumps({"n_ctx": llm.n_ctx, "load_s": load_s, "interpreter_mb": before / 1e3,
                  "peak_loading_mb": after / 1e3, "peak_mb": kilobytes("VmHWM") / 1e3}))
"""


def kv_bytes(config: ModelConfig, n_ctx: int) -> int:
    """Of a float16 cache."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * n_ctx


def measure_model(path: Path, runs: int) -> dict[str, Any]:
    """Sizes in MB (1e6 bytes). `share`: peak less interpreter and libraries, over file + KV cache."""
    config = open_model(path).config
    n_ctx = min(N_CTX, config.max_position_embeddings)
    command = [sys.executable, "-c", CHILD, str(path), str(n_ctx)]
    results = [json.loads(subprocess.check_output(command)) for _ in range(runs)]
    best = {key: min(result[key] for result in results) for key in results[0]}
    file_mb, kv_mb = path.stat().st_size / 1e6, kv_bytes(config, n_ctx) / 1e6
    share = (best["peak_mb"] - best["interpreter_mb"]) / (file_mb + kv_mb)
    return {"model": path.name, "file_mb": file_mb, "kv_mb": kv_mb, **best, "share": share}


def seconds(command: list[str], runs: int) -> float:
    """Best wall time of a command, the interpreter's own start included."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", type=Path, action="append", help="default: the real models")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    runs = 2 if args.quick else args.runs

    models = args.model or [find("demo-original"), find("demo")]
    rows = [measure_model(path, runs) for path in models]
    for row in rows:
        print(
            f"{row['model']}: loads in {row['load_s']:.2f} s; peak {row['peak_mb']:.0f} MB, of it "
            f"{row['interpreter_mb']:.0f} for the interpreter; the rest is {row['share']:.0%} of "
            f"file {row['file_mb']:.0f} + KV {row['kv_mb']:.0f} at {row['n_ctx']} tokens"
        )
    times = {
        "python_s": seconds([sys.executable, "-c", "pass"], runs),
        "import_s": seconds([sys.executable, "-c", "import prosparse"], runs),
        "help_s": seconds([sys.executable, "-m", "prosparse", "--help"], runs),
    }
    print(", ".join(f"{name.removesuffix('_s')} {value:.3f} s" for name, value in times.items()))

    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"memory_{machine.file_label()}.json"
    target.write_text(json.dumps({"machine": machine.describe(), "models": rows, **times}, indent=1) + "\n")
    print(json.dumps({**times, "results": target.name}))


if __name__ == "__main__":
    main()
