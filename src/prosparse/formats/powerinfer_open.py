"""Read the models of PowerInfer: files with the magic PWRI, whoever wrote them.

What PowerInfer computes is read out of them: relu, and low-rank predictors that see the residual stream.
Files that `convert --powerinfer` wrote say in keys of ours what the model was; it is made that again.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from prosparse.formats import predictors as predictor_keys
from prosparse.formats.gguf import GGUFFile
from prosparse.formats.gpuidx import ARCHITECTURE as PLACEMENT
from prosparse.formats.open import assembled
from prosparse.formats.powerinfer import NETWORK_NAMES, ORIGINAL, SCALES
from prosparse.formats.quants import NATIVE, check_scales, transposed, with_type
from prosparse.model.chat import MINICPM
from prosparse.model.config import ModelConfig
from prosparse.model.fold import unfold_scales
from prosparse.model.model import Model, Tensor
from prosparse.model.predictor import Predictors

# In files of others a predictor's recall is not known. It stands as this one number, and the threshold is the
# file's: what was published is what runs.
RECALL_AS_PUBLISHED = 1.0
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_THRESHOLD = "powerinfer.sparse_threshold"
_OTHERS = {
    "bamboo": "its FFN is relu(gate) * relu(up)",
    "falcon": "its FFN has no gate",
    "opt": "its FFN has no gate, and its layers have biases",
    "refact": "PowerInfer itself cannot load it",
}


def is_powerinfer_model(file: GGUFFile) -> bool:
    """By the magic, or by the transposed down of a file whose magic was changed for other programs."""
    return file.powerinfer or any(".ffn_down_t." in name for name in file.tensors)


def model_from_powerinfer(file: GGUFFile, name: str) -> Model:
    """The model of a PowerInfer file; `name` is used if it has none.

    Down is transposed back, as F16 (F32 if it was). In a file without our own keys the predictors have the
    one recall `RECALL_AS_PUBLISHED` and the file's threshold, or 0. ValueError for other architectures, and
    for tensors that are missing, superfluous (PowerInfer fails on those) or of another shape.
    """
    check_architecture(file.metadata)
    tensors, networks = plain_tensors(file)
    metadata = plain_metadata(file.metadata, tensors)

    def predictors(keys: Mapping[str, Any], _: dict[str, Tensor], config: ModelConfig) -> Predictors:
        return read_predictors(keys, networks, config)

    return restored(assembled(metadata, tensors, name, predictors), metadata)


def check_architecture(metadata: Mapping[str, Any]) -> None:
    """ValueError for a file that does not hold a llama."""
    architecture = metadata.get("general.architecture")
    if architecture == PLACEMENT:
        raise ValueError("this is a placement file (.gpuidx), not a model: open the model file beside it")
    if architecture in _OTHERS:
        raise ValueError(
            f"PowerInfer's architecture {architecture} is not supported ({_OTHERS[architecture]}): llama is"
        )
    if architecture != "llama":
        raise ValueError(f"general.architecture {architecture!r:.80} is none of PowerInfer's: llama is read")


def plain_tensors(file: GGUFFile) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors with the names and rows of an ordinary GGUF, those of the predictors)."""
    tensors, networks = {}, {}
    for name, tensor in file.tensors.items():
        if name.endswith((".fc1.weight", ".fc2.weight")):
            networks[name] = tensor
        elif name.endswith(".ffn_down.weight"):
            raise ValueError(f"tensor {name} must not be in a PowerInfer file, which has ffn_down_t instead")
        elif name.endswith(".ffn_down_t.weight"):
            check_scales(name, tensor)
            if len(tensor.shape) != 2:
                raise ValueError(f"tensor {name} has shape {tensor.shape}: a matrix is needed")
            # blocks do not transpose: F16 keeps the numbers of Q4_0 to 12 bits
            kind = tensor.type if tensor.type == "F32" else "F16"
            tensors[name.replace("_t.", ".")] = transposed(tensor, kind)
        elif name == "rope_freqs.weight":
            raise ValueError(
                "tensor rope_freqs.weight must not be in a PowerInfer file, where nothing reads it"
            )
        else:
            tensors[name] = tensor
    if "output.weight" not in tensors:
        raise ValueError("tensor output.weight is missing: PowerInfer has no tied embeddings")
    return tensors, networks


def plain_metadata(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keys of an ordinary GGUF with the same model: relu, unless the file says what relu stands for."""
    unknown = [k for k in metadata if k.startswith("powerinfer.") and k != _THRESHOLD]
    unknown += [k for k in metadata if k.startswith(ORIGINAL) and k not in _original_keys()]
    if unknown:
        raise ValueError(f"{min(unknown)} is not known: was the file made by a later version?")
    keys = {"prosparse.hidden_act": "relu"} | dict(metadata)
    if keys["prosparse.hidden_act"] not in ("relu", "fatrelu"):
        given = f"prosparse.hidden_act {keys['prosparse.hidden_act']!r:.80}"
        raise ValueError(f"{given} contradicts the file: PowerInfer knows relu")
    if "tokenizer.chat_template" not in keys and _is_minicpm(keys, tensors):
        keys["tokenizer.chat_template"] = MINICPM
    return keys


def _original_keys() -> tuple[str, ...]:
    return tuple(f"{ORIGINAL}{name}" for name in ("architecture", "tie_word_embeddings", *SCALES))


def _is_minicpm(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a llama without a template is MiniCPM folded.

    The published MiniCPM-S-1B says so nowhere, and ChatML would make it answer badly. Its marks in the
    vocabulary do, or else its shape, which no other model has.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    marked = isinstance(tokens, list) and {"<用户>", "<AI>"} <= set(tokens)
    embedding = tensors.get("token_embd.weight")
    return marked or (embedding is not None and embedding.shape == (73440, 1536))


def read_predictors(
    metadata: Mapping[str, Any], networks: dict[str, Tensor], config: ModelConfig
) -> Predictors:
    """The file's predictors: with our own keys as they were calibrated, else as published."""
    pairs = predictor_keys.take_networks(networks, NETWORK_NAMES, config)
    if networks:
        raise ValueError(f"tensor {min(networks)} is not part of a predictor of this model")
    threshold = metadata.get(_THRESHOLD, 0.0)
    if not isinstance(threshold, float) or not math.isfinite(threshold):
        raise ValueError(f"{_THRESHOLD} must be a finite number of 32 bits, not {threshold!r:.80}")
    if any(key.startswith(predictor_keys.PREFIX) for key in metadata):
        found = predictor_keys.from_keys(metadata, pairs, config)
        if found.kind != "lowrank" or found.input != "residual":
            raise ValueError("prosparse.predictor.kind and input must be lowrank and residual here")
        return found
    rows = ((threshold,),) * config.num_hidden_layers
    predictors = Predictors("lowrank", "residual", (RECALL_AS_PUBLISHED,), rows, RECALL_AS_PUBLISHED, pairs)
    predictors.check(config)
    return predictors


def restored(model: Model, metadata: Mapping[str, Any]) -> Model:
    """The model before it was folded, by the keys `prosparse.original.*`; without them the model itself.

    What was scaled keeps its type: scaling back rounds once more. An embedding is tied again if the head is
    still the same.
    """
    given = {key: metadata.get(key) for key in _original_keys()}
    architecture, tied, *scales = given.values()
    if architecture is None and tied is None and scales == [None] * len(SCALES):
        return model
    if architecture not in ("llama", "minicpm") or not isinstance(tied, bool):
        raise ValueError(
            f"{ORIGINAL}architecture must be llama or minicpm and {ORIGINAL}tie_word_embeddings a bool, not "
            f"{architecture!r:.80} and {tied!r:.80}"
        )
    if architecture == "minicpm":
        for name, value in zip(SCALES, scales, strict=True):
            if not isinstance(value, float) or not (math.isfinite(value) and value > 0):
                raise ValueError(f"{ORIGINAL}{name} must be a positive number, not {value!r:.80}")
        numbers = [float(str(np.float32(value))) for value in scales]
        folded = model
        # not tied any more where somebody has given the head a type of its own
        tied = tied and folded.tensors[_HEAD].type == folded.tensors[_EMBEDDING].type
        model = unfold_scales(model, *numbers, tied=tied)
        kept = {name: with_type(t, _written(folded.tensors[name].type)) for name, t in model.tensors.items()}
        return replace(model, tensors=kept)
    if scales != [None] * len(SCALES):
        raise ValueError(f"{ORIGINAL}embedding_scale is there, but only minicpm has scales")
    tensors = dict(model.tensors)
    head, embedding = tensors.pop(_HEAD), tensors[_EMBEDDING]
    if not tied or head.type != embedding.type or not np.array_equal(head.data, embedding.data):
        return model
    return replace(model, config=replace(model.config, tie_word_embeddings=True), tensors=tensors)


def _written(kind: str) -> str:
    """The type for a scaled tensor: its own, where we can quantise to it."""
    return kind if kind in NATIVE else "Q8_0"
