"""Open mutated GGUF files and run what opens: a result or a ValueError, nothing else, and quickly.

    python tests/formats/fuzz_gguf.py --n 100000

Run i of a seed is always the same; `--start I --n 1` repeats it.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from prosparse.engine.engine import LLM
from prosparse.formats import gguf
from prosparse.formats.convert import write_model
from prosparse.formats.open import model_from_gguf
from prosparse.formats.quants import quantize
from prosparse.model.activation import Activation
from prosparse.model.config import ModelConfig
from prosparse.model.model import Model, Tensor
from prosparse.model.names import expected_tensors
from prosparse.model.predictor import Predictors
from prosparse.model.tokenizer import TokenizerData

NUMBERS = [0, 1, 2, 3, 7, 31, 32, 33, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
NUMBERS += [0x7FC00000, 0xFF800000, (1 << 60) + 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
KINDS = {"embed_tokens": "Q8_0", "q_proj": "F16", "k_proj": "BF16", "v_proj": "Q5_1", "lm_head": "Q8_0"}
KINDS |= {"gate_proj": "Q4_1", "up_proj": "Q4_1", "down_proj": "Q4_0"}
SLOW_S = 1.0


def seed_file() -> bytes:
    """A complete GGUF of a few kilobytes: every value type, several tensor types."""
    config = ModelConfig(
        architecture="llama",
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        activation=Activation("fatrelu", 0.5),
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        kind = KINDS.get(name.split(".")[-2], "F32")
        tensors[name] = Tensor(kind, shape, quantize(rng.standard_normal(shape), kind))
    pair = [Tensor("F32", (8, 32), quantize(rng.standard_normal((8, 32)), "F32"))]
    pair.append(Tensor("F16", (32, 8), quantize(rng.standard_normal((32, 8)), "F16")))
    predictors = Predictors("lowrank", "residual", (0.9, 0.99), ((0.5, -0.5),), 0.9, ((pair[0], pair[1]),))
    tokenizer = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "b", "▁", "a", "▁a", "é"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.test.values": np.arange(3, dtype=np.int64),
        "tokenizer.test.bools": np.array([True, False]),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        write_model(path, Model(config, tensors, TokenizerData("gguf", tokenizer), "seed", predictors))
        return path.read_bytes()


def fields(data: bytes) -> list[tuple[int, int]]:
    """(position, size) of the numbers in the header of a sound file."""
    found = [(4, 4), (8, 8), (16, 8)]
    file = gguf.parse(data, "seed")
    for key in file.metadata:
        at = data.index(key.encode()) + len(key)
        found += [(at - len(key) - 8, 8), (at, 4), (at + 4, 4), (at + 8, 8)]
    for name, tensor in file.tensors.items():
        at = data.index(name.encode()) + len(name)
        shape_end = at + 4 + 8 * len(tensor.shape)
        found += [(at, 4), (at + 4, 8), (shape_end - 8, 8), (shape_end, 4), (shape_end + 4, 8)]
    return found


def mutate(data: bytes, numbers: list[tuple[int, int]], rng: random.Random) -> bytes:
    """One to three random changes, half of them to numbers of the header."""
    result = bytearray(data)
    header = numbers[-1][0] + 8
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not result:
            break
        at = rng.randrange(min(header if rng.random() < 0.8 else len(data), len(result)))
        match rng.choice("nnnnnbyidct"):
            case "n":
                at, size = rng.choice(numbers)
                old = int.from_bytes(result[at : at + size], "little")
                new = rng.choice([rng.choice(NUMBERS), old + rng.choice([-32, -1, 1, 32]), rng.randrange(40)])
                result[at : at + size] = (new % 256**size).to_bytes(size, "little")
            case "b":
                result[at] ^= 1 << rng.randrange(8)
            case "y":
                result[at] = rng.randrange(256)
            case "i":
                result[at:at] = result[at : at + rng.randint(1, 64)]
            case "d":
                del result[at : at + rng.randint(1, 64)]
            case "c":
                other, size = rng.randrange(len(result)), rng.randint(1, 32)
                result[at : at + size] = result[other : other + size]
            case "t":
                del result[at:]
    return bytes(result)


def open_bytes(data: bytes) -> None:
    """Do to a file all that loading and running do."""
    model = model_from_gguf(gguf.parse(data, "fuzz"), Path("fuzz"))
    llm = LLM(model, n_ctx=8, n_threads=1)
    tokens = llm.tokenizer.encode("a é<s>", special=True)
    llm.tokenizer.decode(tokens)
    # weights may be any numbers, so the logits may be NaN
    llm.forward(tokens[:4] or [0])


def fuzz(n: int, seed: int = 0, start: int = 0) -> tuple[int, int]:
    """(files opened, files refused) of runs `start` to `start + n`; AssertionError for anything else."""
    data = seed_file()
    numbers = fields(data)
    opened = 0
    for i in range(start, start + n):
        mutated = mutate(data, numbers, random.Random(f"{seed} {i}"))
        before = time.perf_counter()
        try:
            open_bytes(mutated)
            opened += 1
        except ValueError as error:
            assert str(error), f"run {i} of seed {seed}: an empty message"
        except Exception as error:
            raise AssertionError(f"run {i} of seed {seed}: {type(error).__name__}") from error
        assert time.perf_counter() - before < SLOW_S, f"run {i} of seed {seed}: too slow"
    return opened, n - opened


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000, help="how many files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first run")
    args = parser.parse_args()
    logging.getLogger("prosparse").setLevel(logging.ERROR)  # not a line for each repacked file
    before = time.perf_counter()
    try:
        opened, refused = fuzz(args.n, args.seed, args.start)
    except AssertionError:
        traceback.print_exc()
        return 1
    seconds = time.perf_counter() - before
    print(f"{args.n} mutated files in {seconds:.0f} s: {opened} opened, {refused} refused, no other outcome")
    return 0


if __name__ == "__main__":
    sys.exit(main())
