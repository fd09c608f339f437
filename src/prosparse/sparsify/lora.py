"""Low-rank adapters (LoRA, Hu et al. 2021) on all linear layers, through `peft`."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NAME = "default"


def add(trunk: "Trunk", rank: int, alpha: int | None = None) -> int:
    """Puts adapters of `rank` into every projection, in place; the number of parameters that then train.

    Adapters and vectors (norms, biases) train, matrices do not. An adapter's product counts alpha / rank
    times; alpha is twice the rank if not given.
    """
    if rank < 1:
        raise ValueError(f"the rank of adapters must be at least 1, not {rank}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("adapters need the package peft: pip install 'prosparse[train]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(TARGETS), bias="none")
    inject_adapter_in_model(config, trunk.model, adapter_name=_NAME)
    trunk.lm_head.requires_grad_(False)
    for name, parameter in trunk.model.named_parameters():
        parameter.requires_grad_(".lora_" in name or parameter.ndim == 1)
    return sum(p.numel() for p in trunk.parameters() if p.requires_grad)


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
