"""LLM: a loaded model, what `prosparse.load` returns."""

from prosparse.model.config import ModelConfig


def core_config(config: ModelConfig) -> dict:
    """The flat dict that `_core.Model` and `NaiveModel` are made from."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "qk_norm",
    )
    return {name: getattr(config, name) for name in names} | {
        "hidden_act": config.activation.name,
        "hidden_act_param": config.activation.param,
        "inv_freq": config.inv_freq().tolist(),
        "rope_attention_factor": config.rope_attention_factor(),
    }
