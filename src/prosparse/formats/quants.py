"""GGML tensor types: ids, quantisation, damage checks, repacking to the types that have native kernels."""

import numpy as np

from prosparse.model.model import BLOCKS, Tensor

TYPE_IDS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "BF16": 30,
}
TYPE_NAMES = {number: name for name, number in TYPE_IDS.items()}
_WEIGHTS_AT_ONCE = 1 << 24  # bounds the float32 copy while requantising
NATIVE = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0")

# where the float16 scales stand in a block, as (byte offset, count)
_SCALES = {
    "Q8_0": (0, 1),
    "Q5_1": (0, 2),
    "Q5_0": (0, 1),
    "Q4_1": (0, 2),
    "Q4_0": (0, 1),
    "Q6_K": (208, 1),
    "Q5_K": (0, 2),
    "Q4_K": (0, 2),
    "Q3_K": (108, 1),
    "Q2_K": (80, 2),
    "IQ4_NL": (0, 1),
    "IQ4_XS": (0, 1),
}


def check_scales(name: str, tensor: Tensor) -> None:
    """ValueError when a block scale of a quantised tensor, or a value of a float vector, is NaN or infinite,
    and for a tensor that holds no weights.

    Float matrices are not read: that would cost a pass over the whole file before the first token.
    """
    if tensor.type not in BLOCKS:
        raise ValueError(f"tensor {name}: type {tensor.type} is of codes, not of weights")
    if tensor.type in _SCALES:
        data = tensor.data
        offset, count = _SCALES[tensor.type]
        blocks = data.reshape(-1, BLOCKS[tensor.type][1])
        exponents = blocks[
            :, offset + 1 : offset + 2 * count : 2
        ]  # high bytes; all exponent bits set = NaN, inf
        bad = ((exponents & 0x7C) == 0x7C).any()
    elif len(tensor.shape) == 1:
        bad = not np.isfinite(tensor.dequantize()).all()
    else:
        return
    if bad:
        raise ValueError(f"tensor {name}: NaN or infinite {'scales' if tensor.type in _SCALES else 'values'}")


def quantize(array: np.ndarray, kind: str) -> np.ndarray:
    """The uint8 data of a float32 array in a native type, by the same arithmetic as llama.cpp."""
    array = np.ascontiguousarray(array, np.float32)
    if kind == "F32":
        data = array
    elif kind == "F16":
        with np.errstate(over="ignore"):
            data = array.astype(np.float16)
        if np.isinf(data).any():
            raise ValueError("a weight is too large for F16: use bf16 or f32")
    else:
        # imported at use: 0.15 s
        from gguf import GGMLQuantizationType, quants

        data = quants.quantize(array, GGMLQuantizationType[kind])
    return np.ascontiguousarray(data).view(np.uint8)


def with_type(tensor: Tensor, kind: str) -> Tensor:
    """The tensor in another type, quantised whenever its data is asked for."""
    if tensor.type == kind:
        return tensor
    return Tensor(kind, tensor.shape, lambda: quantize(tensor.dequantize(), kind))


def transposed(tensor: Tensor, kind: str) -> Tensor:
    """The matrix with rows and columns exchanged, made in the type `kind` whenever its data is asked for."""

    def data() -> np.ndarray:
        if tensor.type == kind and kind in ("F16", "BF16"):
            return np.ascontiguousarray(tensor.data.view(np.uint16).T).view(np.uint8)
        return quantize(tensor.dequantize().T, kind)

    return Tensor(kind, tensor.shape[::-1], data)


def to_native(tensor: Tensor) -> Tensor:
    """The tensor in a type that has native kernels: itself, or repacked with the least loss.

    Q5_0, Q4_K and Q5_K keep their integers and become Q5_1, Q4_1 and Q5_1: the first exactly, the others up
    to the rounding of scales and minima to float16 (3e-4 of the weights' deviation, where requantising to
    Q8_0 loses 4e-3). All others become Q8_0.
    """
    if tensor.type in NATIVE:
        return tensor
    kind = {"Q5_0": "Q5_1", "Q4_K": "Q4_1", "Q5_K": "Q5_1"}.get(tensor.type, "Q8_0")
    columns = tensor.shape[-1]
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    rows = tensor.data.reshape(-1, tensor.data_shape[-1])
    packed: list[np.ndarray] = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if kind == "Q8_0":
            values = Tensor(tensor.type, (len(part), columns), part).dequantize()
            packed.append(quantize(values, kind))
        else:
            packed.append(_pack(*_affine(part.reshape(-1, BLOCKS[tensor.type][1]), tensor.type), kind))
    return Tensor(kind, tensor.shape, np.concatenate(packed, axis=None).reshape(*tensor.shape[:-1], -1))


def _pack(levels: np.ndarray, scales: np.ndarray, minima: np.ndarray, kind: str) -> np.ndarray:
    """Q4_1 or Q5_1 blocks of groups as `_affine` gives them."""
    with np.errstate(over="ignore"):
        head = np.stack([scales, minima], axis=1).astype(np.float16)
    if not np.isfinite(head).all():
        raise ValueError(f"a block scale is too large to repack as {kind}")
    parts: list[np.ndarray] = [head.view(np.uint8)]
    if kind == "Q5_1":
        parts.append(np.packbits(levels >> 4, axis=1, bitorder="little"))
    parts.append(levels[:, :16] & 15 | levels[:, 16:] << 4)
    return np.concatenate(parts, axis=1)


def _affine(blocks: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of 32 weights as `scale * level + minimum`: uint8 [n, 32], float32 [n], float32 [n].

    Layouts: `block_q5_0`, `block_q4_K`, `block_q5_K` of ggml-common.h.
    """
    if kind == "Q5_0":
        scales = blocks[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)
        high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
        low = np.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], axis=1)
        return low | high << 4, scales, -16 * scales
    from gguf.quants import Q4_K

    d, d_min = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[:, :, None]
    scales, minima = Q4_K.get_scale_min(blocks[:, 4:16])
    nibbles = blocks[:, -128:].reshape(-1, 4, 1, 32) >> np.array([[0], [4]], np.uint8)
    levels = (nibbles & 15).reshape(-1, 8, 32)
    if kind == "Q5_K":
        bits = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None]
        levels = levels | (bits & 1) << 4
    return levels.reshape(-1, 32), (d * scales).ravel(), (-d_min * minima).ravel()
