"""The whole method on a CPU in a few minutes: a small Swish model is made, trained, made sparse, and run.

    .venv/bin/python recipes/tiny_cpu.py [--out DIR] [--json]

The text is what the running Python carries: its language reference (`pydoc_data`) and the docstrings of its
library. No network, no GPU. It fails where the sparse model misses the goal, at least 85 % of neurons silent
at a loss within 3 % of the control's (the dense model, trained on as many more tokens without sparsity), and
where torch, the engine and a GGUF file answer differently.
"""

import argparse
import ast
import contextlib
import io
import json
import math
import random
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers

from prosparse import cli, load
from prosparse.engine.completion import Completion
from prosparse.engine.sampler import SamplingParams
from prosparse.formats import open_model
from prosparse.formats.hf import write_folder
from prosparse.model.config import ModelConfig
from prosparse.model.model import Model, Tensor
from prosparse.model.names import expected_tensors
from prosparse.model.tokenizer import Tokenizer, TokenizerData
from prosparse.sparsify import hf_model, progress, tokens
from prosparse.sparsify.batches import Batch, Mixture
from prosparse.sparsify.config import TrainConfig
from prosparse.sparsify.losses import LossMix
from prosparse.sparsify.measure import measure
from prosparse.sparsify.schedule import LearningRate
from prosparse.sparsify.trainer import Feed, Trainer

END = "<|endoftext|>"
VOCAB, WIDTH, FFN, LAYERS, HEADS = 1024, 96, 768, 2, 3  # 0.6 M weights, 72 % of them in FFNs
CONTEXT, BATCH, HELD_OUT = 128, 8, 128  # tokens a sequence; sequences a step; sequences that measure
DENSE_TOKENS, DENSE_RATE = 1_228_800, 3e-3
SPARSE_TOKENS, SPARSE_RATE = 512_000, 2e-3
# the dense model has far to go yet, so text teaches more than its predictions do
TARGET, NEXT_TOKEN, DISTIL = 0.9, 1.0, 0.0
PROMPT, N_PREDICT = "If the object", 48
LEAST_SPARSITY, MOST_RATIO = 0.85, 1.03
# the engine's keys and values are f16, which may flip a gate at its threshold: tokens this close are tied
TIE = 0.5


def corpus() -> list[str]:
    """A text a topic of the language reference and a text a module, its docstrings, always shuffled alike."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    left_out |= {"lib2to3", "idlelib", "turtledemo"}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = list(topics.values())
    for path in sorted(library.rglob("*.py")):
        if not left_out & set(path.relative_to(library).parts):
            nodes = ast.walk(ast.parse(path.read_bytes()))
            found = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
            texts.append("\n\n".join(filter(None, found)))
    texts = list(filter(None, texts))
    random.Random(0).shuffle(texts)
    return texts


def write_rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_tokenizer(texts: list[str], folder: Path) -> None:
    """Byte-level BPE that splits text as GPT-2's does, as files of a Hugging Face folder."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_model(tokenizer: Path) -> Model:
    """A small LLaMA with Swish and random weights."""
    config = ModelConfig(
        architecture="llama",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_ids=(0,),  # special tokens come first
    )
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in expected_tensors(config).items():
        values = np.ones(shape, np.float32)  # of norms
        if len(shape) == 2:
            to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (0.5 if to_stream else 1.0) / math.sqrt(shape[1] * (LAYERS if to_stream else 1))
            scale = 0.02 if "embed_tokens" in name else scale
            values = scale * rng.standard_normal(shape, np.float32)
        tensors[name] = Tensor("F32", shape, values.view(np.uint8))
    return Model(config, tensors, TokenizerData("hf", {}, tokenizer), "tiny")


def train_dense(model: Model, data: Path, folder: Path) -> Batch:
    """Trains on the next token and writes folder/model; the sequences of `data` that nothing trains on."""
    encoder = tokens.Encoder(model.tokenizer, model.config.bos_token_id, model.config.eos_token_ids)
    store = tokens.build(str(data), encoder, folder / "tokens", workers=1)
    # another seed than the next stage's: it then reads the text in another order
    mixture = Mixture([store], [1.0], context=CONTEXT, seed=1, vocab_size=VOCAB, held_out=HELD_OUT)
    steps = DENSE_TOKENS // (CONTEXT * BATCH)
    rate = LearningRate("cosine", DENSE_RATE, steps, warmup_steps=steps // 20)
    plan = TrainConfig(steps, BATCH, rate, LossMix(next_token=1.0, distil=0.0), weight_decay=0.1)
    trunk = hf_model.load(model)
    progress.train(Trainer(trunk, None, [Feed(mixture, BATCH, steps)], plan, folder), model.config, [])
    write_folder(folder / "model", hf_model.to_model(trunk, model), "F32")
    held_out = mixture.held_out(0)
    assert held_out is not None, "the text has hundreds of thousands of tokens"
    return held_out


def prosparse(*argv: object) -> str:
    """One command of the command line; what it printed."""
    line = [str(part) for part in argv]
    print("$ prosparse", *line, flush=True)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(line)
    print(out.getvalue(), flush=True)
    if code:
        sys.exit(code)
    return out.getvalue()


def answer(model: Path) -> Completion:
    """The engine's greedy answer."""
    greedy = SamplingParams(temperature=0)
    return load(model).generate(PROMPT, max_tokens=N_PREDICT, sampling=greedy)


@torch.no_grad()
def disagreement(folder: Path, answer: Completion) -> float:
    """By how much torch's logits prefer another token somewhere in a greedy answer. 0: it says the same."""
    model = open_model(folder)
    trunk = hf_model.load(model).eval()
    tokenizer = Tokenizer.build(model.tokenizer, model.config.bos_token_id, model.config.eos_token_ids)
    ids = torch.tensor([*tokenizer.encode(PROMPT), *answer.token_ids])
    logits = (trunk.hidden(ids[None, :-1])[0] @ trunk.head.T)[-len(answer.token_ids) :]
    chosen = logits.gather(1, ids[-len(answer.token_ids) :, None])[:, 0]
    return float((logits.max(1).values - chosen).max())


def recipe(out: Path) -> dict[str, Any]:
    """All steps, in the order of the method; the figures."""
    data, apart, sparse, final = out / "train.jsonl", out / "apart.jsonl", out / "sparse", out / "final"
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def done(step: str) -> None:
        seconds[step] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    texts = corpus()
    split = len(texts) // 16
    write_rows(apart, texts[:split])
    write_rows(data, texts[split:])
    write_tokenizer(texts[split:], out / "tokenizer")
    done("text and tokenizer")

    held_out = train_dense(random_model(out / "tokenizer"), data, out / "dense")
    done("dense")

    source = ("-m", out / "dense" / "model", "--data", data, "--out", sparse, "--workers", 1)
    sizes = ("--context", CONTEXT, "--batch-tokens", BATCH * CONTEXT, "--held-out", HELD_OUT)
    losses = ("--next-token", NEXT_TOKEN, "--distil", DISTIL, "--control")
    method = ("--target", TARGET, "--tokens", SPARSE_TOKENS, "--lr", SPARSE_RATE, *losses)
    f32 = ("--type", "f32", "--device", "cpu")
    prosparse("sparsify", *source, *sizes, *method, *f32)
    (row,) = json.loads((sparse / "report.json").read_text())["rows"]
    done("sparsify and control")

    # on text that nothing was trained on, nor is measured on
    search = ("--data", apart, "--tokens", 1 << 14, "--context", CONTEXT, "--max-ppl", 1.01)
    prosparse("threshold", "-m", sparse / "model", *search, *f32, "--out", final)
    last = measure(hf_model.load(open_model(final / "model")), held_out)
    sparsity = float(last.sparsity.mean())
    done("threshold")

    f32_gguf, q8_0_gguf = out / "tiny-f32.gguf", out / "tiny-q8_0.gguf"
    prosparse("convert", final / "model", f32_gguf, "--type", "f32")
    prosparse("convert", final / "model", q8_0_gguf, "--type", "q8_0")
    from_folder, from_gguf = answer(final / "model"), answer(f32_gguf)
    printed = prosparse("run", "-m", q8_0_gguf, "-p", PROMPT, "--raw", "--temp", 0, "-n", N_PREDICT, "--json")
    small = json.loads(printed.splitlines()[-1])
    done("convert and run")

    both = DENSE_TOKENS + SPARSE_TOKENS
    print(f"{'':<18}{'held-out loss':>14}{'sparsity':>10}{'tokens':>12}")
    for name, loss, share, count in (
        ("dense", row["original"], 0.0, DENSE_TOKENS),
        ("control", row["control"], 0.0, both),
        ("sparse", row["sparse"], row["sparsity"], both),
        ("after threshold", last.loss, sparsity, both),
    ):
        print(f"{name:<18}{loss:>14.4f}{share:>10.1%}{count:>12,}")
    print(", ".join(f"{step} {spent:.0f} s" for step, spent in seconds.items()))
    return {
        "sparsity": sparsity,
        "loss": last.loss,
        "control_loss": row["control"],
        "ratio": last.loss / row["control"],
        "dense_loss": row["original"],
        "held_out_tokens": last.tokens,
        "seconds": seconds,
        "text": small["text"],
        "text_sparsity": small["sparsity"],
        "compared_tokens": from_folder.n_gen,
        "gguf_is_folder": from_gguf.token_ids == from_folder.token_ids,
        "torch_prefers_by": disagreement(final / "model", from_folder),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for all files [a temporary one]")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    if args.out and args.out.exists():
        parser.error(f"{args.out} exists: name a new folder")
    out = args.out or Path(tempfile.mkdtemp(prefix="prosparse-tiny-"))
    out.mkdir(parents=True, exist_ok=True)
    # two are faster by two thirds on an idle machine, but many times slower where a core is busy
    torch.set_num_threads(1)
    result = recipe(out)
    print(f"all files: {out}")
    if args.json:
        print(json.dumps(result), flush=True)
    sparsity, ratio, prefers = result["sparsity"], result["ratio"], result["torch_prefers_by"]
    checks = (
        (result["gguf_is_folder"], "the engine's answers from the folder and from its GGUF file differ"),
        (prefers <= TIE, f"torch answers otherwise: another token's logit is greater by {prefers:.2f}"),
        (sparsity >= LEAST_SPARSITY, f"a sparsity of {sparsity:.1%} is below {LEAST_SPARSITY:.0%}"),
        (ratio <= MOST_RATIO, f"the loss is {ratio:.4f} times the control's, above {MOST_RATIO}"),
    )
    if wrong := [why for ok, why in checks if not ok]:
        sys.exit(f"tiny_cpu: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
