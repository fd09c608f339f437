"""Training speed on one GPU: `prosparse sparsify`'s loop beside plain transformers on the same shapes.

python -m benchmarks.train_speed [--out FILE.json] [--profile]

SmolLM2-135M's shape with random weights and random tokens, all parameters trained to the original's logits,
65,536 tokens a step in sequences of 1024. The rival is what one writes with transformers alone: bfloat16
autocast, its own models under torch.compile, fused AdamW, KL of whole logits, the largest micro-batch that
fits. Speeds are medians over the steps after the first ones.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from prosparse.model.activation import Activation
from prosparse.model.config import ModelConfig
from prosparse.model.model import Model, Tensor
from prosparse.model.names import expected_tensors
from prosparse.model.tokenizer import TokenizerData
from prosparse.sparsify import distributed, hf_model
from prosparse.sparsify.batches import Mixture
from prosparse.sparsify.config import TrainConfig
from prosparse.sparsify.controller import TargetControl
from prosparse.sparsify.schedule import LearningRate
from prosparse.sparsify.trainer import Feed, Trainer

CONTEXT, SEQUENCES, WARMUP = 1024, 64, 5


def smollm2_shape() -> Model:
    config = ModelConfig(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        eos_token_ids=(2,),
    )
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = np.ones(shape, np.float32)
        if len(shape) == 2:
            values = rng.standard_normal(shape, np.float32) * np.float32(0.04)
        tensors[name] = Tensor("F32", shape, values.view(np.uint8))
    return Model(config, tensors, TokenizerData("none"), "smollm2-135m-shape")


def mixture() -> Mixture:
    tokens = np.random.default_rng(1).integers(0, 49152, 4_000_000, dtype=np.uint16)
    store = SimpleNamespace(
        tokens=tokens,
        loss=np.ones(len(tokens), np.uint8),
        offsets=np.arange(0, len(tokens) + 1, 1000),
        source="random",
    )
    return Mixture([store], [1.0], context=CONTEXT, seed=0, vocab_size=49152)


def ours(model: Model, steps: int, micro: int, compile: bool, profile: Path | None = None) -> dict[str, Any]:
    world, device = distributed.join()
    sparse = replace(model, config=replace(model.config, activation=Activation("fatrelu", 0.0)))
    student = hf_model.load(sparse, device=device)
    teacher = hf_model.load(model, device=device, dtype=torch.bfloat16)
    config = TrainConfig(
        steps=steps,
        micro_sequences=micro,
        learning_rate=LearningRate("constant", 1e-5, steps),
        control=TargetControl(0.9),
        bfloat16=True,
        compile=compile,
        checkpoint_every=10**9,
    )
    with tempfile.TemporaryDirectory() as folder:
        feeds = [Feed(mixture(), SEQUENCES, steps)]
        trainer = Trainer(student, teacher, feeds, config, Path(folder), world)
        times: list[float] = []
        last = time.perf_counter()
        profiler: Any = None

        def on_step(metrics: dict[str, Any]) -> None:
            nonlocal last, profiler
            now = time.perf_counter()
            times.append(now - last)
            last = now
            if profile is not None and metrics["step"] == steps - 2:
                profiler = torch.profiler.profile()
                profiler.start()
            elif profiler is not None and metrics["step"] == steps - 1:
                torch.cuda.synchronize()
                profiler.stop()
                table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=45)
                profile.write_text(table)
                profiler = None
                last = time.perf_counter()

        torch.cuda.reset_peak_memory_stats()
        trainer.run(on_step)
    return _result(times)


def plain(model: Model, steps: int, micro: int, compile: bool) -> dict[str, Any]:
    """The same objective with transformers alone: ReLU, KL to the original, no thresholds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = model.config.to_hf()
    models = []
    for act, dtype in (("relu", torch.float32), ("silu", torch.bfloat16)):
        with torch.device("cuda"):
            config = AutoConfig.for_model(**values | {"hidden_act": act, "hidden_act_param": None})
            models.append(AutoModelForCausalLM.from_config(config, dtype=dtype))
    student, teacher = models[0].train(), models[1].eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    forward, theirs = student, teacher
    if compile:
        forward, theirs = torch.compile(student), torch.compile(teacher)
    data, parts = mixture(), SEQUENCES // micro
    times: list[float] = []
    torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        start = time.perf_counter()
        for part in range(parts):
            batch = data.batch(step * SEQUENCES + part * micro, micro)
            tokens = torch.from_numpy(batch.tokens[:, :-1]).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                with torch.no_grad():
                    p = theirs(input_ids=tokens, use_cache=False).logits
                q = forward(input_ids=tokens, use_cache=False).logits
            kl = F.kl_div(
                F.log_softmax(q.float(), -1).flatten(0, 1),
                F.log_softmax(p.float(), -1).flatten(0, 1),
                log_target=True,
                reduction="batchmean",
            )
            (kl / parts).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return _result(times)


def _result(times: list[float]) -> dict[str, Any]:
    speed = SEQUENCES * CONTEXT / statistics.median(times[WARMUP:])
    return {
        "tokens_per_s": round(speed),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "first_step_s": round(times[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--micro", type=int, default=64, metavar="N", help="prosparse's sequences at a time")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="where one step's kernels are listed")
    parser.add_argument("--only", help="one row")
    args = parser.parse_args()
    model = smollm2_shape()
    rows: dict[str, Any] = {
        "prosparse, compiled": lambda: ours(model, args.steps, args.micro, True, args.profile),
        "prosparse, eager": lambda: ours(model, args.steps, args.micro, False),
        "transformers, compiled": lambda: _largest(model, args.steps, True),
        "transformers, eager": lambda: _largest(model, args.steps, False),
    }
    results = {}
    for name, measure in rows.items():
        if args.only and args.only != name:
            continue
        results[name] = measure()
        print(name, json.dumps(results[name]), flush=True)
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    distributed.leave()
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": results}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def _largest(model: Model, steps: int, compile: bool) -> dict[str, Any]:
    for micro in (64, 32, 16, 8):
        try:
            return plain(model, steps, micro, compile) | {"micro": micro}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    raise ValueError("the GPU is too small")


if __name__ == "__main__":
    main()
