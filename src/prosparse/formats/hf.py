"""Hugging Face model folders: config.json, safetensors (sharded too), tokenizer files, predictors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats import predictors
from prosparse.formats.files import written_whole
from prosparse.formats.quants import check_scales
from prosparse.formats.safetensors import read_safetensors, write_safetensors
from prosparse.model.config import ModelConfig
from prosparse.model.model import Model, Tensor
from prosparse.model.names import less_one_in_hf
from prosparse.model.tokenizer import TokenizerData

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_folder(folder: Path) -> Model:
    """Open an HF folder. Matrices are views of the mapped files; vectors are widened to F32."""
    values = read_json(folder / "config.json")
    if (generation := folder / "generation_config.json").exists():
        values["eos_token_id"] = _all_tokens(values, read_json(generation))
    try:
        config = ModelConfig.from_hf(values)
        tensors = _read_weights(folder)
        if config.tie_word_embeddings and (head := tensors.pop("lm_head.weight", None)):
            embedding = tensors.get("model.embed_tokens.weight")
            if embedding and (head.type != embedding.type or not np.array_equal(head.data, embedding.data)):
                raise ValueError(
                    "lm_head.weight differs from the embedding, though tie_word_embeddings is true"
                )
        for name, tensor in tensors.items():
            check_scales(name, tensor)
            if len(tensor.shape) == 1 and tensor.type != "F32":
                tensors[name] = Tensor("F32", tensor.shape, tensor.dequantize().view(np.uint8))
            if less_one_in_hf(config, name):
                tensors[name] = _OnePlus(tensors[name])
        tokenizer = TokenizerData("hf", {}, folder) if _has_tokenizer(folder) else TokenizerData("none")
        predicted = predictors.read_folder(folder, config)
        return Model(config, tensors, tokenizer, folder.resolve().name, predicted)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(folder)) else f"{folder}: {message}") from None


class _OnePlus(Tensor):
    """A vector of which the folder stores one less. It is kept: (1 + w) - 1 is not w for small w."""

    __slots__ = ("stored",)

    def __init__(self, stored: Tensor) -> None:
        super().__init__("F32", stored.shape, (1 + stored.dequantize()).view(np.uint8))
        self.stored = stored


def _less_one(tensor: Tensor) -> Tensor:
    """The inverse, exact also for what was 1 + w in a GGUF file."""
    if isinstance(tensor, _OnePlus):
        return tensor.stored
    return Tensor("F32", tensor.shape, (tensor.dequantize() - 1).view(np.uint8))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ValueError names a file that is none."""
    if not path.is_file():
        raise ValueError(f"{path}: this file is missing; is the folder an HF model?")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def _all_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[Any]:
    """The end tokens of both files, config.json's first; chat models often list theirs only in the other."""
    tokens: list[Any] = []
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        tokens += value if isinstance(value, list) else [] if value is None else [value]
    return tokens


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / _INDEX).is_file():
        places = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{folder / _INDEX}: weight_map must give the file of each tensor")
        tensors = {}
        for file in sorted(set(places.values())):
            if Path(file).name != file or not (folder / file).is_file():
                raise ValueError(f"{folder / _INDEX}: weight_map names {file!r}, which is not in the folder")
            for name, tensor in read_safetensors(folder / file).items():
                if places.get(name) != file:
                    raise ValueError(f"{folder / file}: tensor {name} is not where the index says")
                tensors[name] = tensor
        if missing := sorted(places.keys() - tensors.keys()):
            raise ValueError(f"{folder / _INDEX}: tensor {missing[0]} is not in {places[missing[0]]}")
    elif (folder / _WEIGHTS).is_file():
        tensors = read_safetensors(folder / _WEIGHTS)
    else:
        raise ValueError(
            f"no {_WEIGHTS} (.bin weights are not read: save the model with safe_serialization=True)"
        )
    # old checkpoints store this buffer, which the config determines
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}


def write_folder(folder: Path, model: Model, dtype: str, shard_bytes: int = 5_000_000_000) -> None:
    """Write a model of float tensors as an HF folder. The config, without which it does not open, comes last.

    `dtype` ("F32", "F16", "BF16") goes into config.json. With an activation or architecture that
    transformers lacks (fatrelu, shiftrelu; minicpm), the code that adds it is written too: `from_pretrained`
    runs it if given trust_remote_code=True, and else refuses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.tokenizer.write_hf(folder)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in model.tensors.items():
        if less_one_in_hf(model.config, name):
            tensor = _less_one(tensor)
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / _WEIGHTS, shards[0])
    else:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(folder / file, shard)
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": model.size_bytes}, "weight_map": weight_map}
        _write_json(folder / _INDEX, index)
    if model.predictors:
        predictors.write_folder(folder, model.predictors)
    values = model.config.to_hf() | {"torch_dtype": _DTYPES[dtype]}
    if model.config.architecture == "minicpm" or model.config.activation.name in ("fatrelu", "shiftrelu"):
        values["auto_map"] = _write_modules(folder, values["architectures"][0])
    _write_json(folder / "config.json", values)


def _write_modules(folder: Path, native: str) -> dict[str, str]:
    """Writes the module that adds activations to transformers' class `native`; returns `auto_map`, which
    points to it. MiniCPM, of which transformers has no class, gets one of its own on top."""
    names, minicpm = ["modeling_prosparse"], native == "MiniCPMForCausalLM"
    if minicpm:
        names.append("modeling_prosparse_minicpm")
    for name in names:
        text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        if not minicpm:
            text = text.replace("LlamaForCausalLM", native)
        with written_whole(folder / f"{name}.py") as file:
            file.write(text.encode())
    auto_map = {"AutoModelForCausalLM": f"{names[-1]}.ProSparse{native}"}
    return auto_map | ({"AutoConfig": f"{names[-1]}.ProSparseMiniCPMConfig"} if minicpm else {})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")
