"""A second reader of PowerInfer files, written from the section "PowerInfer files" of docs/formats.md alone.

It also computes what that section says PowerInfer computes, for one sequence, token by token.
"""

import struct
from dataclasses import dataclass

import numpy as np

F32, F16, Q4_0, Q8_0, I32 = 0, 1, 2, 8, 18
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34), I32: (1, 4)}
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass
class Stored:
    kind: int
    shape: tuple  # rows, columns
    data: bytes

    def values(self):
        """float32 (or int32) of `shape`."""
        raw = np.frombuffer(self.data, np.uint8)
        if self.kind == F32:
            return raw.view("<f4").reshape(self.shape)
        if self.kind == I32:
            return raw.view("<i4").reshape(self.shape)
        if self.kind == F16:
            return raw.view("<f2").astype(np.float32).reshape(self.shape)
        blocks = raw.reshape(-1, BLOCKS[self.kind][1])
        scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
        if self.kind == Q8_0:
            return (scales * blocks[:, 2:].copy().view(np.int8)).reshape(self.shape)
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
        return (scales * (codes - 8)).reshape(self.shape)


def read(data):
    """({key: (type, value)}, {tensor: Stored}), both in the order of the file."""
    at = 0

    def take(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def text():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    assert data[:4] == b"PWRI"
    at = 4
    assert take("I") == 3
    n_tensors, n_keys = take("Q"), take("Q")
    keys = {}
    for _ in range(n_keys):
        key, kind = text(), take("I")
        if kind == 8:
            keys[key] = (kind, text())
        elif kind == 9:
            element, count = take("I"), take("Q")
            values = [text() if element == 8 else take(NUMBERS[element]) for _ in range(count)]
            keys[key] = ((kind, element), values)
        else:
            keys[key] = (kind, take(NUMBERS[kind]))
    entries = []
    for _ in range(n_tensors):
        name = text()
        columns_first = [take("Q") for _ in range(take("I"))]
        entries.append((name, tuple(columns_first[::-1]), take("I"), take("Q")))
    assert not any(data[at : at + -at % 32])
    start = at + -at % 32
    tensors, end = {}, 0
    for name, shape, kind, offset in entries:
        weights, size = BLOCKS[kind]
        nbytes = int(np.prod(shape)) // weights * size
        assert offset == end and shape[-1] % weights == 0 and name not in tensors
        end = offset + nbytes + -nbytes % 32
        tensors[name] = Stored(kind, shape, data[start + offset : start + offset + nbytes])
        assert not any(data[start + offset + nbytes : start + end])
    assert start + end == len(data)
    return keys, tensors


def forward(keys, tensors, tokens, threshold=None):
    """(float32 logits [n, vocabulary], bool [n, layers, neurons]: not skipped), as PowerInfer does it."""

    def key(name):
        return keys[f"llama.{name}"][1]

    def weight(name):
        return tensors[f"{name}.weight"].values()

    def norm(x, name):
        mean = np.mean(x * x) + np.float32(key("attention.layer_norm_rms_epsilon"))
        return x / np.sqrt(mean) * weight(name)

    heads, groups = key("attention.head_count"), key("attention.head_count_kv")
    size = key("rope.dimension_count")
    frequencies = key("rope.freq_base") ** (-np.arange(0, size, 2) / size)
    if threshold is None:
        threshold = keys.get("powerinfer.sparse_threshold", (6, 0.0))[1]

    def turned(x, position):
        """Consecutive pairs are rotated."""
        z = x.reshape(-1, size // 2, 2)
        turn = np.exp(1j * position * frequencies)
        z = (z[..., 0] + 1j * z[..., 1]) * turn
        return np.stack([z.real, z.imag], -1).reshape(-1, size).astype(np.float32)

    layers = key("block_count")
    past = [([], []) for _ in range(layers)]
    logits, named = [], []
    for position, token in enumerate(tokens):
        h = weight("token_embd")[token]
        named.append([])
        for layer in range(layers):
            at = f"blk.{layer}."
            x = norm(h, at + "attn_norm")
            past[layer][0].append(turned(weight(at + "attn_k") @ x, position))
            past[layer][1].append((weight(at + "attn_v") @ x).reshape(groups, size))
            q = turned(weight(at + "attn_q") @ x, position)
            k, v = (np.stack(part).repeat(heads // groups, 1) for part in past[layer])
            scores = np.einsum("hk,shk->hs", q, k) / np.sqrt(np.float32(size))
            shares = np.exp(scores - scores.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            h = h + weight(at + "attn_output") @ np.einsum("hs,shk->hk", shares, v).ravel()
            n = norm(h, at + "ffn_norm")
            s = weight(at + "fc2") @ np.maximum(weight(at + "fc1") @ h, 0)
            on = ~(s < np.float32(threshold))
            named[-1].append(on)
            y = np.where(on, np.maximum(weight(at + "ffn_gate") @ n, 0) * (weight(at + "ffn_up") @ n), 0)
            h = h + y @ weight(at + "ffn_down_t")
        logits.append(weight("output") @ norm(h, "output_norm"))
    return np.array(logits, np.float32), np.array(named)
