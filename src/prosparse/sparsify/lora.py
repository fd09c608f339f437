"""Low-rank adapters (LoRA, Hu et al. 2021) on all linear layers, through `peft`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prosparse.model.model import Model
from prosparse.model.names import less_one_in_hf

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk

_NAME = "default"
_OVERSAMPLED = 32  # columns beyond the rank, which make the random projection's singular vectors exact enough


def add(trunk: "Trunk", ranks: Mapping[str, int]) -> int:
    """Puts adapters into every projection, in place, of the rank of its kind (`q_proj`, ...); the number of
    parameters that then train.

    Adapters and vectors (norms, biases) train, matrices do not. An adapter's product counts twice.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("adapters need the package peft: pip install 'prosparse[train]'") from None
    config = LoraConfig(
        target_modules=list(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern={kind: 2 * rank for kind, rank in ranks.items()},
        bias="none",
    )
    inject_adapter_in_model(config, trunk.model, adapter_name=_NAME)
    trunk.lm_head.requires_grad_(False)
    for name, parameter in trunk.model.named_parameters():
        parameter.requires_grad_(".lora_" in name or parameter.ndim == 1)
    return sum(p.numel() for p in trunk.parameters() if p.requires_grad)


def start_at(trunk: "Trunk", tuned: Model) -> None:
    """Adapters of `trunk` begin as the nearest of their rank to what `tuned` adds to its matrices (singular
    values), its vectors as those of `tuned`. Embeddings stay: adapters leave them alone."""
    vectors = dict(trunk.model.named_parameters())
    with torch.no_grad():
        for name, module in trunk.model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            a, b = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
            base, rank = module.base_layer.weight, len(a)
            theirs = torch.from_numpy(tuned.tensors[f"{name}.weight"].dequantize()).to(base)
            u, s, v = torch.svd_lowrank(theirs - base, min(rank + _OVERSAMPLED, *base.shape), niter=8)
            root = (s[:rank] / module.scaling[_NAME]).sqrt()
            b.zero_()[:, : len(root)] = u[:, :rank] * root
            a.zero_()[: len(root)] = (v[:, :rank] * root).T
        for name, tensor in tuned.tensors.items():
            if len(tensor.shape) == 1:
                values = tensor.dequantize() - less_one_in_hf(tuned.config, name)
                vectors[name].copy_(torch.from_numpy(values))


def merged(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`parameters` (whole tensors by name) with adapters added to what they adapt, under the plain names.

    Without adapters it returns what it is given.
    """
    scales = {
        name: module.scaling[_NAME] for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    result = {}
    for name, value in parameters.items():
        if ".lora_" in name:
            continue
        layer, _, kind = name.rpartition(".base_layer.")
        if layer in scales and kind == "weight":
            a, b = (parameters[f"{layer}.lora_{side}.{_NAME}.weight"] for side in "AB")
            value = (value.float() + scales[layer] * (b.float() @ a.float())).to(value.dtype)
        result[name.replace(".base_layer.", ".")] = value
    return result
