"""Models for PowerInfer: GGUF files with the magic PWRI, that it loads and runs as they are.

Byte by byte in docs/formats.md. PowerInfer computes relu(gate n) * (up n) of a LLaMA, where a low-rank
predictor that sees the residual stream allows; what else a model has is folded into that or refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats import predictors as predictor_keys
from prosparse.formats.gguf import POWERINFER_MAGIC, write_gguf
from prosparse.formats.open import interleave
from prosparse.formats.quants import transposed, with_type
from prosparse.model import names
from prosparse.model.config import ModelConfig
from prosparse.model.fold import fold_scales, scaled
from prosparse.model.model import BLOCKS, Model, Tensor
from prosparse.model.predictor import Predictors

TYPES = ("F32", "F16", "Q8_0", "Q4_0")  # those its kernels are known to compute rightly
NETWORK_NAMES = ("blk.{}.fc1.weight", "blk.{}.fc2.weight")
ORIGINAL = "prosparse.original."  # our own keys: what was folded away
SCALES = ("embedding_scale", "residual_scale", "logit_scale")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}
_SOLVER_GROUP = 256
# scores are raised by this where the common threshold, below 0, is to be close to 0
_NEAR_ZERO = 64.0
# and at most by this: weights must stay in the range of F16
_MOST = 1024.0


@dataclass(frozen=True, slots=True)
class PowerInferFile:
    """A file before it is written: tensors by GGUF name, made when asked for; `notes` are for the user."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]

    def write(self, path: Path) -> None:
        """The file appears only when complete."""
        write_gguf(path, self.metadata, self.tensors, POWERINFER_MAGIC)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def prepare(
    model: Model,
    kind: str | None = None,
    *,
    pure: bool = False,
    as_relu: bool = False,
    more: Mapping[str, Any] | None = None,
) -> PowerInferFile:
    """The model as PowerInfer can run it. ValueError, saying what to do, for one that it cannot.

    `kind` is the type of the matrices (None: theirs, where PowerInfer has it). Embedding, output and
    predictors are Q8_0 where the others are Q4_0, unless `pure`; down is Q4_0 with them, else F16. `as_relu`
    lets it run a FATReLU model as a ReLU one. `more` are further keys.
    """
    config, found = model.config, check(model, as_relu)
    if kind is not None and kind not in TYPES:
        known = ", ".join(t.lower() for t in TYPES)
        raise ValueError(f"PowerInfer has no kernels that work for {kind.lower()}: --type can be {known}")
    tokenizer, notes = _tokenizer(model)
    if config.activation.name == "fatrelu":
        notes.append(
            f"PowerInfer runs this file as relu: a gate between 0 and {config.activation.param:g} that the "
            "predictor names counts there, and is 0 in the model. What that costs is to be measured: "
            "PowerInfer's `perplexity -m DST -f TEXT` against `prosparse perplexity -m SRC -f TEXT`"
        )
    if config.intermediate_size % _SOLVER_GROUP:
        notes.append(
            f"{config.intermediate_size} neurons are not a multiple of 256: PowerInfer's own solver fails, "
            "so for a GPU write the placement here (--activation-stats DIR --vram-budget GIB)"
        )
    found, threshold, loose = with_one_threshold(found)
    if loose:
        notes.append(
            "PowerInfer has one threshold for all layers, which theirs, of both signs or close to 0, cannot "
            f"all become: in layers {', '.join(map(str, loose))} it takes more neurons than asked for"
        )
    folded = fold_scales(model)
    kinds = {name: _kind(name, tensor, kind, pure) for name, tensor in model.tensors.items()}
    tensors = _tensors(folded, found, kinds, kind, pure)
    metadata = {
        "general.architecture": "llama",
        "general.name": model.name,
        "general.file_type": _FILE_TYPES[tensors["blk.0.ffn_gate.weight"].type],
        "general.quantization_version": 2,
        **dict(more or {}),
        **_settings(folded.config),
        "powerinfer.sparse_threshold": float(threshold),
        **tokenizer,
        **_originals(config),
        **predictor_keys.gguf_metadata(found),
    }
    return PowerInferFile(metadata, tensors, tuple(notes))


def check(model: Model, as_relu: bool) -> Predictors:
    """The predictors of a model that PowerInfer's graph can compute. ValueError for another model."""
    config, found = model.config, model.predictors
    if config.architecture not in ("llama", "mistral", "minicpm"):
        raise ValueError(
            f"PowerInfer cannot run {config.architecture}: of these models it has llama only, without "
            "biases or norms of q and k"
        )
    if config.sliding_window:
        raise ValueError(
            f"PowerInfer has no sliding window, the model one of {config.sliding_window} tokens: it cannot "
            "run it"
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"PowerInfer takes heads of hidden_size / heads, not {config.num_attention_heads} of "
            f"{config.head_dim} for {config.hidden_size}: it cannot run this model"
        )
    if config.rope_scaling and config.rope_scaling.type not in ("linear", "yarn"):
        raise ValueError(
            f"PowerInfer knows linear and yarn rotary scaling, not {config.rope_scaling.type}: it cannot run "
            "this model"
        )
    if config.activation.name == "fatrelu" and not as_relu:
        raise ValueError(
            f"PowerInfer has no FATReLU: --as-relu lets it run this model as relu, without its threshold "
            f"{config.activation.param:g}"
        )
    if config.activation.name not in ("relu", "fatrelu"):
        raise ValueError(
            f"PowerInfer computes relu, the model {config.activation.name}: make it a ReLU model first "
            "(prosparse sparsify)"
        )
    if found is None:
        raise ValueError(
            "PowerInfer needs predictors and this model has none: train them with `prosparse predict`"
        )
    if found.kind != "lowrank" or found.input != "residual":
        raise ValueError(
            "PowerInfer needs predictors of kind lowrank with the input residual, these are "
            f"{found.kind} with {found.input}: train others with `prosparse predict`"
        )
    return found


def with_one_threshold(predictors: Predictors) -> tuple[Predictors, np.float32, list[int]]:
    """Predictors whose thresholds for the default recall are one number, which is the second result.

    Scores grow with fc2, so a layer's threshold t becomes T where fc2 is multiplied by T/t. That needs one
    sign. With both, T is below 0, and the scores of layers at or above 0, the third result, grow so much that
    T is close to 0 for them: they name more neurons, never fewer. With 0 and above, T is 0, likewise.
    """
    own = predictors.at().astype(np.float64)
    chosen = own[own < 0] if (own < 0).any() else own
    common = np.float32(0)
    if chosen.all():
        mean = float(np.exp(np.log(np.abs(chosen)).mean()))
        if chosen[0] < 0 or mean / chosen.min() <= _MOST:
            common = np.float32(np.copysign(mean, chosen[0]))
    factors = np.divide(float(common), own, out=np.full_like(own, np.inf), where=own != 0)
    exact = (np.sign(own) == np.sign(common)) & (factors <= _MOST)
    if common:
        factors = np.where(exact, factors, np.where(own < 0, _MOST, _NEAR_ZERO))
    else:
        exact, factors = own == 0, np.ones_like(own)
    networks = tuple(
        (fc1, scaled(fc2, float(factor)))
        for (fc1, fc2), factor in zip(predictors.networks, factors, strict=True)
    )
    thresholds = tuple(
        tuple(value * float(factor) for value in row)
        for row, factor in zip(predictors.thresholds, factors, strict=True)
    )
    loose = [int(layer) for layer in np.flatnonzero(~exact)]
    return replace(predictors, networks=networks, thresholds=thresholds), common, loose


def _kind(name: str, tensor: Tensor, kind: str | None, pure: bool) -> str:
    """The type a tensor is written in."""
    if len(tensor.shape) == 1:
        return "F32"
    down = name.endswith("mlp.down_proj.weight")
    if kind is None:
        wanted = {"BF16": "F16"}.get(tensor.type, tensor.type if tensor.type in TYPES else "Q8_0")
        wanted = "F16" if down else wanted
    elif kind == "Q4_0" and not pure and name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted = "Q8_0"
    else:
        wanted = kind
    # PowerInfer reads any other type of down as if it were F16
    return "F16" if down and wanted != "Q4_0" else wanted


def _tensors(
    folded: Model, predictors: Predictors, kinds: Mapping[str, str], kind: str | None, pure: bool
) -> dict[str, Tensor]:
    """All tensors of the file; a tied embedding stands there twice."""
    embedding = "model.embed_tokens.weight"
    found = dict(folded.tensors)
    found.setdefault("lm_head.weight", found[embedding])
    tensors = {}
    for name, tensor in found.items():
        wanted = kinds.get(name, kinds[embedding])
        gguf_name = names.to_gguf(name)
        assert gguf_name, "a Model has only names of the table"
        if name.endswith("mlp.down_proj.weight"):
            gguf_name = gguf_name.replace("ffn_down", "ffn_down_t")
            _check_rows(gguf_name, tensor.shape[0], wanted)
            tensors[gguf_name] = transposed(tensor, wanted)
            continue
        _check_rows(gguf_name, tensor.shape[-1], wanted)
        typed = with_type(tensor, wanted)
        if heads := names.interleaved_heads(folded.config, name):
            typed = Tensor(typed.type, typed.shape, partial(_interleaved, typed, heads))
        tensors[gguf_name] = typed
    network_kind = "Q8_0" if kind == "Q4_0" and not pure else kind
    for layer, pair in enumerate(predictors.networks):
        stored = folded.predictors.networks[layer] if folded.predictors else pair
        for pattern, tensor, source in zip(NETWORK_NAMES, pair, stored, strict=True):
            wanted = _kind("", source, network_kind, pure)
            if tensor.shape[1] % BLOCKS[wanted][0] and not pure:
                wanted = "F16"
            name = pattern.format(layer)
            _check_rows(name, tensor.shape[1], wanted)
            tensors[name] = with_type(tensor, wanted)
    return tensors


def _interleaved(tensor: Tensor, heads: int) -> np.ndarray:
    return interleave(tensor.data, heads)


def _check_rows(name: str, columns: int, kind: str) -> None:
    """Blocks must fill rows: ValueError before anything is written."""
    if columns % BLOCKS[kind][0]:
        more = ", train the predictor with another rank, or leave --pure out" if ".fc" in name else ""
        raise ValueError(f"{name} has rows of {columns}, {kind} needs a multiple of 32: use --type f16{more}")


def _settings(config: ModelConfig) -> dict[str, Any]:
    """The keys PowerInfer reads, in the types it wants: int is u32, float is f32."""
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.head_dim,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
    }
    theirs = config.to_gguf()
    for name in ("type", "factor", "original_context_length"):
        if (value := theirs.get(f"llama.rope.scaling.{name}")) is not None:
            keys[f"rope.scaling.{name}"] = value
    return {f"llama.{key}": value for key, value in keys.items()}


def _originals(config: ModelConfig) -> dict[str, Any]:
    """Our own keys, unknown to PowerInfer and so without effect there: what its format cannot say."""
    keys: dict[str, Any] = {
        "prosparse.hidden_act": config.activation.name,
        "prosparse.hidden_act_param": float(config.activation.param),
        f"{ORIGINAL}architecture": "minicpm" if config.architecture == "minicpm" else "llama",
        f"{ORIGINAL}tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.architecture == "minicpm":
        keys |= {f"{ORIGINAL}{name}": float(getattr(config, name)) for name in SCALES}
    return keys


def _tokenizer(model: Model) -> tuple[dict[str, Any], list[str]]:
    """(the `tokenizer.*` keys, notes). ValueError for a tokenizer that PowerInfer does not have."""
    keys = model.tokenizer.to_gguf_metadata(model.config.vocab_size)
    keys |= {k: v for k, v in model.config.to_gguf().items() if k.startswith("tokenizer.")}
    kind, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    notes = []
    if kind is None:
        raise ValueError("PowerInfer needs a tokenizer, the model has none: convert the folder that holds it")
    if kind not in ("llama", "gpt2") or not isinstance(tokens, list):
        raise ValueError(
            f"PowerInfer has tokenizers of kind llama (SentencePiece BPE) and gpt2, not {kind}: it cannot "
            "run this model"
        )
    if len(tokens) != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokens)} tokens, the model {model.config.vocab_size} embeddings, and "
            "PowerInfer needs one for each: add the missing ones to the tokenizer"
        )
    if len(set(tokens)) != len(tokens) or "" in tokens:
        raise ValueError(
            "PowerInfer needs tokens that are not empty and differ: a name stands twice, or is empty"
        )
    if kind == "llama" and "<0x0A>" not in tokens:
        raise ValueError(
            "PowerInfer needs the byte token <0x0A> in a SentencePiece vocabulary: it cannot run this model"
        )
    if kind == "gpt2" and "tokenizer.ggml.merges" not in keys:
        raise ValueError("tokenizer.ggml.merges is missing, without which PowerInfer cannot run this model")
    if kind == "gpt2" and keys.get("tokenizer.ggml.pre", "gpt-2") not in ("gpt-2", "default"):
        notes.append(
            f"PowerInfer splits texts as gpt-2 does, the model as {keys['tokenizer.ggml.pre']}: some texts "
            "become other tokens there"
        )
    if kind == "llama" and not keys.get("tokenizer.ggml.add_bos_token", True):
        notes.append("PowerInfer puts BOS before every text, and the model was made to be run without")
    for key, dtype in (("scores", np.float32), ("token_type", np.int32)):
        if (values := keys.get(f"tokenizer.ggml.{key}")) is not None:
            keys[f"tokenizer.ggml.{key}"] = np.asarray(values, dtype)
    return keys, notes
