"""MiniCPM for transformers, which has no class of it: LLaMA with three factors, and its sparse activations.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs it; without, transformers does not
know the architecture. Written by prosparse beside the weights.
"""

import math
from functools import partial

from torch import Tensor, nn
from transformers import LlamaConfig

from .modeling_prosparse import ProSparseLlamaForCausalLM


class ProSparseMiniCPMConfig(LlamaConfig):
    """LLaMA's keys and `scale_emb`, `scale_depth`, `dim_model_base`; ValueError where one is missing."""

    model_type = "minicpm"

    def factors(self) -> tuple[float, float, float]:
        """What embeddings, the outputs of attention and MLP, and the last hidden states are multiplied by."""
        keys = ("scale_emb", "scale_depth", "dim_model_base")
        if missing := [key for key in keys if not getattr(self, key, None)]:
            raise ValueError(f"config.json: {missing[0]} is missing")
        residual = self.scale_depth / math.sqrt(self.num_hidden_layers)
        return self.scale_emb, residual, self.dim_model_base / self.hidden_size


class ProSparseMiniCPMForCausalLM(ProSparseLlamaForCausalLM):
    """Each factor is applied where the published code does, so that half precision rounds alike."""

    config_class = ProSparseMiniCPMConfig

    def __init__(self, config: ProSparseMiniCPMConfig) -> None:
        embedding, residual, last = config.factors()
        super().__init__(config)
        _scale(self.model.embed_tokens, embedding)
        for layer in self.model.layers:
            _scale(layer.self_attn.o_proj, residual)
            _scale(layer.mlp.down_proj, residual)
        # not at the head, so that the logits are the head's product with the hidden states and nothing more
        _scale(self.model.norm, last)


def _scale(module: nn.Module, factor: float) -> None:
    module.register_forward_hook(partial(_times, factor))


def _times(factor: float, module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * factor
