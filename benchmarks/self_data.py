"""How fast a model writes its own training data, by each way of attention.

    python -m benchmarks.self_data -m MODEL [--batch 1024] [--context 1024] [--compile]
    python -m benchmarks.self_data --shape       # SmolLM2-135M's sizes, random weights: for speed only

The first batch compiles and captures graphs and is timed apart; the others are the figure. Ends with one
JSON line.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from prosparse.model.config import ModelConfig
from prosparse.model.model import Model, Tensor
from prosparse.model.names import expected_tensors
from prosparse.model.tokenizer import TokenizerData
from prosparse.sparsify import hf_model
from prosparse.sparsify.sampling import ATTENTION, Sampler


def random_smollm2() -> Model:
    """SmolLM2-135M with random weights, without a tokenizer."""
    config = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, tie_word_embeddings=True)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = np.float32(0.03) * rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            values += 1
        tensors[name] = Tensor("F32", shape, values.view(np.uint8))
    return Model(config, tensors, TokenizerData(), config.architecture)


def measure(model: Model, attention: str, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, milliseconds a position, and the most memory in GB (1e9 bytes) of one setting."""
    cuda = args.device.startswith("cuda")
    trunk = hf_model.load(model, device=args.device, dtype=torch.bfloat16 if cuda else torch.float32)
    if args.compile:
        torch.compiler.reset()
        trunk.compile()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    options = {"temperature": args.temperature, "top_p": args.top_p, "attention": attention}
    sampler = Sampler(trunk, args.batch, args.context, graphs=False if args.eager else None, **options)
    starts = [[0]] * args.batch
    sampler.sample(starts, 0)
    first = time.perf_counter() - start
    seconds = []
    for number in range(1, 1 + max(1, round(args.tokens / (args.batch * args.context)))):
        start = time.perf_counter()
        rows = sampler.sample(starts, number)  # waits for the device
        seconds.append(time.perf_counter() - start)
    typical = float(np.median(seconds))
    return {
        "attention": attention,
        "tokens_per_s": rows.size / typical,
        "position_ms": 1e3 * typical / args.context,
        "first_batch_s": first,
        "batches": len(seconds),
        "peak_gb": torch.cuda.max_memory_reserved() / 1e9 if cuda else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.self_data", description=__doc__.split("\n")[0]
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-m", "--model", help="GGUF file, Hugging Face folder, Hub id, or demo-original")
    which.add_argument("--shape", action="store_true", help="SmolLM2-135M's sizes with random weights")
    parser.add_argument("--tokens", type=float, default=3e6, help="to time, besides the first batch")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--attention", default=",".join(ATTENTION), help="settings to compare")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the layers")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    if args.shape:
        model = random_smollm2()
    else:
        from prosparse.formats import open_model

        model = open_model(args.model)
    results = []
    for attention in args.attention.split(","):
        result = measure(model, attention, args)
        results.append(result)
        memory = "" if result["peak_gb"] is None else f", {result['peak_gb']:.1f} GB"
        print(
            f"{attention}: {result['tokens_per_s']:,.0f} tokens/s, {result['position_ms']:.2f} ms a position "
            f"of {args.batch} rows{memory}; first batch {result['first_batch_s']:.1f} s"
        )
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(json.dumps({"device": device, "torch": torch.__version__, **vars(args), "results": results}))


if __name__ == "__main__":
    main()
