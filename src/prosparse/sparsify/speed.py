"""How much arithmetic training takes, and what share of a GPU's peak that is."""

from prosparse.model.config import ModelConfig

# dense bfloat16 FLOP/s without sparsity, from the makers' data sheets
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX 5090": 210e12,
}


def peak_flops(device_name: str) -> float | None:
    """bfloat16 FLOP/s of a GPU by its name; None for one that is not in the table."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)


def training_flops(config: ModelConfig, context: int, *, distil: bool, lora: bool = False) -> float:
    """Floating-point operations a token: products of matrices and causal attention, no elementwise work.

    Forward 2 a weight, backward 4 (2 where the matrices are frozen, as with adapters), and 2 for the original
    that is distilled from. Work done twice to save memory is not counted: MFU, not HFU.
    """
    d, d_ff, q = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    weights = config.num_hidden_layers * (2 * d * q + 2 * d * kv + 3 * d * d_ff) + config.vocab_size * d
    # a query meets half the context on average, in two products
    attention = config.num_hidden_layers * 2 * q * context
    once = 2 * weights + attention
    trained = (2 if lora else 3) * 2 * weights + 3 * attention
    return trained + (once if distil else 0.0)
