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
    """ValueError when a block scale of a quantised tensor, or a value of a float vector, is NaN or infinite.

    Float matrices are not read: that would cost a pass over the whole file before the first token.
    """
    data = tensor.data
    if tensor.type in _SCALES:
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
