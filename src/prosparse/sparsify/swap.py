"""Activation substitution: the gated MLPs of a Hugging Face model with another activation in them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosparse.model.activation import Activation

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")  # what the families call it


class SparseMLP(nn.Module):
    """down(act(gate x) * up x), with the parameter names of the MLP it takes the place of.

    `threshold`: a float32 scalar, of FATReLU and shifted ReLU; training may move it. `observe`, if set, is
    called with every x1 = act(gate x) * up x [..., d_ff].
    """

    threshold: Tensor

    def __init__(self, mlp: nn.Module, activation: Activation) -> None:
        super().__init__()
        for name in _PROJECTIONS:
            setattr(self, name, getattr(mlp, name))
        self.activation = activation.name
        self.observe: Callable[[Tensor], None] | None = None
        device = self.gate_proj.weight.device
        # not in the state dict: the file keeps it in the configuration, as `hidden_act_param`
        threshold = torch.tensor(activation.param, dtype=torch.float32, device=device)
        self.register_buffer("threshold", threshold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x1 = activate(self.activation, self.gate_proj(x), self.threshold) * self.up_proj(x)
        if self.observe is not None:
            self.observe(x1)
        return self.down_proj(x1)


def activate(name: str, x: Tensor, threshold: Tensor | float = 0.0) -> Tensor:
    """`Activation.__call__` on tensors. FATReLU compares in float32, as 0.03 has no bfloat16 form, and keeps
    NaN, which must not pass for an inactive neuron."""
    match name:
        case "silu":
            return F.silu(x)
        case "relu":
            return F.relu(x)
        case "fatrelu":
            return torch.where(x.float() < threshold, 0.0, x)
        case "shiftrelu":
            return F.relu(x - threshold).to(x.dtype)
        case "gelu":
            return F.gelu(x, approximate="tanh")
    raise ValueError(f"unknown activation {name!r}")


def substitute(model: nn.Module, activation: Activation) -> list[SparseMLP]:
    """Puts `activation` into every MLP of a causal language model, in place; the new MLPs in layer order.

    The configuration then says so, as `hidden_act` and `hidden_act_param`. ValueError for a model without one
    gated MLP a layer, or whose MLPs compute something else than down(act(gate x) * up x).
    """
    config: Any = model.config
    found = {name: module for name, module in model.named_modules() if _is_gated(module)}
    kind = getattr(config, "model_type", type(model).__name__)
    layers = getattr(config, "num_hidden_layers", None)
    if not found:
        raise ValueError(f"{kind} has no gated MLP ({', '.join(_PROJECTIONS)}): there is nothing to sparsify")
    if len(found) != layers:
        raise ValueError(f"{kind} has {len(found)} gated MLPs in {layers} layers; one a layer is supported")
    replaced = []
    for name, mlp in found.items():
        _check_formula(name, mlp)
        new = SparseMLP(mlp, activation)
        new.train(mlp.training)
        model.set_submodule(name, new)
        replaced.append(new)
    config.hidden_act = activation.name
    config.hidden_act_param = activation.param if activation.name in ("fatrelu", "shiftrelu") else None
    if hasattr(config, "hidden_activation"):  # Gemma
        config.hidden_activation = activation.name
    return replaced


def _is_gated(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)


def _check_formula(name: str, mlp: nn.Module) -> None:
    """On random numbers, so that an MLP with anything more in it is never replaced by one without."""
    if isinstance(mlp, SparseMLP):
        return
    act = next((getattr(mlp, a) for a in _ACTIVATIONS if callable(getattr(mlp, a, None))), None)
    if act is None:
        raise ValueError(f"{name} has no activation under the names {', '.join(_ACTIVATIONS)}")
    weight = mlp.gate_proj.weight
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=generator).to(weight)
    was_training = mlp.training
    mlp.eval()
    with torch.no_grad():
        expected = mlp(x).float()
        got = mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x)).float()
    mlp.train(was_training)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise ValueError(f"{name} computes something else than down(act(gate x) * up x): it is not supported")
