"""Between this project's models and Hugging Face modules that train."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prosparse.model.activation import Activation
from prosparse.model.adapter import Adapter, fingerprint
from prosparse.model.fold import fold_factors, fold_thresholds
from prosparse.model.model import Model
from prosparse.model.model import Tensor as StoredTensor
from prosparse.model.names import expected_tensors, less_one_in_hf
from prosparse.sparsify import coded, lora
from prosparse.sparsify.distributed import full
from prosparse.sparsify.swap import SparseMLP, substitute

# a layer whose threshold stayed 0 is folded as if it were this: no gate lies between
_SMALLEST = 1e-6
_CAUSAL = "prosparse_causal"


class Trunk(nn.Module):
    """A causal language model without its last product: `hidden` is what the head multiplies.

    `mlps` in layer order; `head` [vocab, d], the embedding itself where the two are tied.
    """

    def __init__(self, model: nn.Module, mlps: list[SparseMLP]) -> None:
        super().__init__()
        self.model: Any = model
        self.mlps = mlps
        self._compiled = False
        self._states: list[Tensor] | None = None
        self.lm_head: Any = self.model.get_output_embeddings()
        self._check_head()
        self.model.get_input_embeddings().register_forward_hook(_as_autocast)
        self.model.set_output_embeddings(nn.Identity())

    @property
    def head(self) -> nn.Parameter:
        weight: nn.Parameter = self.lm_head.weight
        return weight

    @property
    def embedding(self) -> nn.Parameter:
        """[vocab, d]"""
        weight: nn.Parameter = self.model.get_input_embeddings().weight
        return weight

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, each of which holds one of `mlps`."""
        inside = {id(mlp) for mlp in self.mlps}
        return [
            module
            for module in self.model.modules()
            if any(id(child) in inside for child in module.children())
        ]

    def forward(
        self,
        tokens: Tensor,
        document: Tensor | None = None,
        after: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """after(hidden [batch, n, d], head), or the hidden states. Where the model is spread over processes
        the head is whole only in here."""
        hidden = self.hidden(tokens, document)
        return hidden if after is None else after(hidden, self.head)

    def hidden(self, tokens: Tensor, document: Tensor | None = None) -> Tensor:
        """[batch, n, d] of `tokens` int64 [batch, n]. With `document` [batch, n], tokens see only their own
        one, and positions start anew in each."""
        if self._states is not None:
            self._states = []
        if document is None:
            return self.model(input_ids=tokens, use_cache=False).logits
        place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        starts = torch.where(document != document.roll(1, 1), place, 0)
        starts[:, 0] = 0
        positions = place - starts.cummax(1).values
        mask = (document[:, None, :, None] == document[:, None, None, :]) & (
            place[:, None, :, None] >= place[:, None, None, :]
        )
        return self.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits

    def matrices(self) -> dict[str, nn.Parameter]:
        """Those that train, by name, but for the embedding and the head, whose rows are words."""
        ends = {id(self.head), id(self.embedding)}
        return {
            name: p
            for name, p in self.named_parameters()
            if p.requires_grad and p.ndim == 2 and id(p) not in ends
        }

    def freeze_embeddings(self) -> None:
        """The embeddings and the head do not train."""
        self.lm_head.requires_grad_(False)
        self.model.get_input_embeddings().requires_grad_(False)

    def watch(self) -> None:
        """From now on `states` has what the layers of each forward pass gave."""
        if self._states is None:
            self._states = []
            for layer in self.layers:
                layer.register_forward_hook(self._keep)

    def states(self) -> list[Tensor]:
        """Hidden states [batch, n, d] after each layer of the last forward pass, which are then forgotten."""
        states, self._states = self._states, []
        assert states, "watch() comes before the forward pass"
        return states

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        assert self._states is not None
        self._states.append(output[0] if isinstance(output, tuple) else output)

    def compile(self) -> None:
        """torch.compile of every layer's forward: they are alike, so one is compiled instead of thirty."""
        if not self._compiled:
            self._compiled = True
            for layer in self.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)

    def recompute(self) -> None:
        """Layers keep their inputs only, and compute what is between again when gradients need it."""
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def _check_head(self) -> None:
        """That logits are nothing but head(hidden), as the chunked losses assume."""
        if getattr(self.lm_head, "bias", None) is not None:
            raise ValueError("the model's head has a bias; training such models is not supported")
        tokens = torch.arange(4, device=self.head.device)[None] % self.head.shape[0]
        with torch.no_grad():
            logits = self.model(input_ids=tokens, use_cache=False).logits
            self.model.set_output_embeddings(nn.Identity())
            again = self.lm_head(self.model(input_ids=tokens, use_cache=False).logits)
        if not torch.equal(logits, again):
            raise ValueError(
                "the model changes its logits after the head; training such models is not supported"
            )


def _as_autocast(_: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
    """Embeddings as narrow as autocast makes products, so that the residual stream is."""
    kind = embeddings.device.type
    return embeddings.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else embeddings


def load(model: Model, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Trunk:
    """A model as a trainable module; quantised weights are dequantised. Its activation stays its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # ours is put in below; transformers knows neither fatrelu nor shiftrelu
    values = model.config.to_hf() | {"hidden_act": "silu", "hidden_act_param": None}
    with torch.device(device):
        if model.config.architecture == "minicpm":  # transformers has no class of it
            from prosparse.formats.modeling_prosparse_minicpm import (
                ProSparseMiniCPMConfig,
                ProSparseMiniCPMForCausalLM,
            )

            config = ProSparseMiniCPMConfig(**values)
            module = ProSparseMiniCPMForCausalLM._from_config(config, dtype=dtype)
        else:
            config = AutoConfig.for_model(**values)
            module = AutoModelForCausalLM.from_config(config, dtype=dtype)
            _attend_without_mask(module)
    state = {
        name: torch.from_numpy(tensor.dequantize() - less_one_in_hf(model.config, name)).to(dtype)
        for name, tensor in model.tensors.items()
    }
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [
        name for name in missing if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    ]
    if missing or unexpected:
        raise ValueError(f"transformers' {config.model_type} has other weights: {(missing or unexpected)[0]}")
    module.tie_weights()
    return Trunk(module, substitute(module, model.config.activation))


def _attend_without_mask(module: Any) -> None:
    """PyTorch's fused attention under a name of ours: for its own, transformers makes sure that no mask is
    needed by waiting for the device, once a forward pass. Windows need a mask."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kinds = getattr(module.config, "layer_types", None) or []
    if getattr(module.config, "sliding_window", None) is None and set(kinds) <= {"full_attention"}:
        AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
        module.set_attn_implementation(_CAUSAL)


def to_model(trunk: Trunk, original: Model, type: str = "F32") -> Model:
    """The trained weights as a model with one activation: thresholds of layers are folded into one.

    `type` of the matrices: F32, F16 or BF16. Tokenizer and name are those of `original`.
    """
    thresholds = [float(mlp.threshold) for mlp in trunk.mlps]
    activation, common = _common(trunk.mlps[0].activation, thresholds)
    config = replace(original.config, activation=activation)
    parameters = weights(trunk)
    tensors = {
        name: _stored(parameters[name].float() + less_one_in_hf(config, name), "F32")
        for name in expected_tensors(config)
    }
    model = Model(config, tensors, original.tokenizer, original.name)
    if common is not None:
        model = fold_thresholds(model, [max(t, _SMALLEST) for t in thresholds], common)
    # after folding, so that every weight is rounded once
    rounded = {
        name: _stored(torch.from_numpy(tensor.dequantize()), type) if len(tensor.shape) == 2 else tensor
        for name, tensor in model.tensors.items()
    }
    return replace(model, tensors=rounded)


def to_adapter(trunk: Trunk, original: Model, model: Model) -> Adapter:
    """What makes `model`, which `to_model` returned, of `original`, where changes are codes on a grid."""
    thresholds = [float(mlp.threshold) for mlp in trunk.mlps]
    _, common = _common(trunk.mlps[0].activation, thresholds)
    factors = {}
    if common is not None:
        factors = fold_factors([max(t, _SMALLEST) for t in thresholds], common)
    matrices = {
        name: replace(change, scale=factors.get(name, 1.0))
        for name, change in coded.changes(trunk.model).items()
    }
    vectors = {name: tensor for name, tensor in model.tensors.items() if len(tensor.shape) == 1}
    return Adapter(fingerprint(original.tensors), model.config.activation, matrices, vectors, model.name)


def weights(trunk: Trunk) -> dict[str, Tensor]:
    """The parameters under their Hugging Face names, whole, with adapters merged. All processes must call."""
    for module in trunk.modules():
        if reshard := getattr(module, "reshard", None):
            reshard()  # what an evaluation has left whole is narrow
    parameters = {name: full(p.detach()).cpu() for name, p in trunk.model.named_parameters()}
    parameters = lora.merged(trunk.model, coded.merged(trunk.model, parameters))
    return parameters | {"lm_head.weight": full(trunk.head.detach()).cpu()}


def _common(name: str, thresholds: Sequence[float]) -> tuple[Activation, float | None]:
    """The one activation of all layers, and the threshold to fold to where they differ."""
    if name not in ("fatrelu", "shiftrelu"):
        return Activation(name), None
    if len(set(thresholds)) == 1:
        return Activation(name, thresholds[0]), None
    if name == "shiftrelu":
        raise ValueError("shifts that differ by layer have no common form")
    common = float(np.median([max(t, _SMALLEST) for t in thresholds]))
    return Activation("fatrelu", common), common


def _stored(values: Tensor, type: str) -> StoredTensor:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type]
    data = values.to("cpu", dtype).contiguous()
    return StoredTensor(type, tuple(data.shape), data.view(torch.uint8).numpy())
