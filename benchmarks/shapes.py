"""Model files of real shapes with random weights, written in seconds: decoding speed depends on shapes only.

Gate weights are independent, so a neuron's pre-activation is Gaussian with a known deviation, and the share
of inactive neurons follows from the FATReLU threshold alone: one file serves every sparsity (`threshold`).
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

CACHE = Path(__file__).resolve().parent.parent / ".cache"
TYPES = ("q8_0", "q4_0", "f16", "bf16")
WEIGHT_STD = 0.02  # wanted; `weight_std` says what the type makes of it
CODES = np.clip(np.arange(-128, 128), -127, None) * (np.arange(-128, 128) > -128)  # -127 ... 127, symmetric
NIBBLES = np.arange(-8, 8) * (np.arange(-8, 8) > -8)  # -7 ... 7, symmetric


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a LLaMA model."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    head_dim: int

    def matrices(self) -> list[tuple[str, int, int]]:
        """GGUF name, rows and columns of every matrix, in file order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = [
            ("attn_q", q, self.hidden),
            ("attn_k", kv, self.hidden),
            ("attn_v", kv, self.hidden),
            ("attn_output", self.hidden, q),
            ("ffn_gate", self.ffn, self.hidden),
            ("ffn_up", self.ffn, self.hidden),
            ("ffn_down", self.hidden, self.ffn),
        ]
        blocks = [(f"blk.{i}.{name}.weight", r, c) for i in range(self.layers) for name, r, c in layer]
        head = [] if self.tied else [("output.weight", self.vocab, self.hidden)]
        return [("token_embd.weight", self.vocab, self.hidden), *blocks, *head]

    def norms(self) -> list[str]:
        """GGUF names of the RMSNorm vectors."""
        blocks = [f"blk.{i}.{name}.weight" for i in range(self.layers) for name in ("attn_norm", "ffn_norm")]
        return [*blocks, "output_norm.weight"]


def minicpm_1b(layers: int = 52) -> Shape:
    """MiniCPM-1B, its scales folded into plain LLaMA weights."""
    return Shape("1b", 1536, 3840, layers, 24, 8, 73440, tied=True, head_dim=64)


def llama_7b(layers: int = 8) -> Shape:
    """LLaMA2-7B; the default keeps 8 of its 32 layers, so that several systems fit in memory at once."""
    return Shape("7b", 4096, 11008, layers, 32, 32, 32000, tied=False, head_dim=128)


def tiny(layers: int = 2) -> Shape:
    """For tests."""
    return Shape("tiny", 256, 1024, layers, 4, 2, 320, tied=True, head_dim=64)


@dataclass(frozen=True, slots=True)
class _Codec:
    """How random bytes become stored weights."""

    table: np.ndarray  # stored unit of each random byte
    scale: np.ndarray  # the bytes every block of 32 starts with; empty for float types
    std: float  # deviation of the weights that come out


def _codec(type: str) -> _Codec:
    if type in ("q8_0", "q4_0"):
        codes = CODES if type == "q8_0" else NIBBLES
        scale = np.array([WEIGHT_STD / codes.std()], np.float16)
        nibbles = (NIBBLES + 8).astype(np.uint8)
        pairs = (nibbles[:, None] << 4 | nibbles).ravel()
        table = codes.astype(np.int8).view(np.uint8) if type == "q8_0" else pairs
        return _Codec(table, scale.view(np.uint8), float(scale[0]) * float(codes.std()))
    weights = (CODES * (WEIGHT_STD / CODES.std())).astype(np.float32)
    none = np.empty(0, np.uint8)
    if type == "f16":
        halves = weights.astype(np.float16)
        return _Codec(halves.view(np.uint16), none, float(halves.std(dtype=np.float64)))
    if type == "bf16":
        upper = weights.view(np.uint32) >> 16
        return _Codec(
            upper.astype(np.uint16), none, float((upper << 16).view(np.float32).std(dtype=np.float64))
        )
    raise ValueError(f"type {type!r} is not one of {', '.join(TYPES)}")


def _random_rows(rng: np.random.Generator, type: str, rows: int, cols: int) -> np.ndarray:
    """One matrix as stored: uint8 [rows, row bytes]."""
    codec = _codec(type)
    units = rows * cols // (2 if type == "q4_0" else 1)
    stored = codec.table[np.frombuffer(rng.bytes(units), np.uint8)].view(np.uint8)
    if codec.scale.size:
        codes = stored.reshape(rows * cols // 32, -1)
        stored = np.empty((len(codes), codec.scale.size + codes.shape[1]), np.uint8)
        stored[:, : codec.scale.size] = codec.scale
        stored[:, codec.scale.size :] = codes
    return stored.reshape(rows, -1)


def weight_std(type: str) -> float:
    """Deviation of the weights `write` stores."""
    return _codec(type).std


def threshold(shape: Shape, type: str, share: float) -> float:
    """FATReLU threshold that leaves `share` of the neurons inactive; at 0 nothing is.

    The gate's input has RMS 1, so a pre-activation has deviation weight_std * sqrt(hidden).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share of inactive neurons must be in [0, 1), not {share}")
    if share == 0:
        return -1e9
    return weight_std(type) * math.sqrt(shape.hidden) * statistics.NormalDist().inv_cdf(share)


def write(shape: Shape, type: str, path: Path, seed: int = 0) -> None:
    """Write a GGUF file with every matrix of one type, the head too; it appears whole or not at all."""
    rng = np.random.Generator(np.random.SFC64(seed))
    ggml_type = GGMLQuantizationType[type.upper()]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    _add_metadata(writer, shape)

    row_bytes = {cols: _random_rows(rng, type, 1, cols).shape[1] for _, _, cols in shape.matrices()}
    for name in shape.norms():
        writer.add_tensor_info(name, (shape.hidden,), np.dtype(np.float32), 4 * shape.hidden)
    for name, rows, cols in shape.matrices():
        stored = (rows, row_bytes[cols])
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in shape.norms():
        writer.write_tensor_data(np.ones(shape.hidden, np.float32))
    for _, rows, cols in shape.matrices():
        writer.write_tensor_data(_random_rows(rng, type, rows, cols))
    writer.close()
    part.replace(path)


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"random-{shape.name}")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    # the smallest SentencePiece vocabulary that loads: specials, bytes, and a name for each other id
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    plain = [f"t{i}" for i in range(shape.vocab - len(special) - len(byte_tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *byte_tokens, *plain])
    writer.add_token_scores([-float(i) for i in range(shape.vocab)])
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    writer.add_token_types([*kinds, *[TokenType.BYTE] * len(byte_tokens), *[TokenType.NORMAL] * len(plain)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def cached(shape: Shape, type: str) -> Path:
    """The shape's file in the cache folder, written at first use."""
    path = CACHE / f"{shape.name}-{shape.layers}l-{type}.gguf"
    if not path.exists():
        write(shape, type, path)
    return path
