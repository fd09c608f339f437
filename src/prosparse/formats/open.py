"""Open a model by path, Hub id, or as one of the built-in ones."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats import predictors
from prosparse.formats.gguf import GGUFFile, read_gguf
from prosparse.formats.quants import check_scales
from prosparse.model import names
from prosparse.model.config import ModelConfig
from prosparse.model.model import Model, Tensor
from prosparse.model.predictor import Predictors
from prosparse.model.tokenizer import TokenizerData

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_model(path: str | Path) -> Model:
    """Open a GGUF file (whole, split, or PowerInfer's), an HF folder, a Hub id (`org/name`), or a built-in
    model: `demo`, which is sparse, or `demo-original`.

    A Hub id is downloaded; `demo` is made in the user's cache at its first use. Weights are views of the
    mapped files where their layout allows. ValueError for anything damaged or unsupported, FileNotFoundError
    when there is nothing at `path`.
    """
    found = find(path)
    if found.is_dir():
        from prosparse.formats.hf import read_folder

        return read_folder(found)
    return model_from_gguf(read_gguf(found), found)


def find(path: str | Path) -> Path:
    """The file or folder that `path` means."""
    if str(path) in ("demo", "demo-original"):
        # imported at use: it needs this module
        from prosparse.formats import builtin

        return builtin.demo_path() if str(path) == "demo" else builtin.original_path()
    found = Path(path)
    if found.exists():
        return found
    if _HUB_ID.fullmatch(str(path)) and found.suffix != ".gguf":
        # imported at use: slow, and only Hub ids need it
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
        return Path(snapshot_download(str(path), allow_patterns=patterns, ignore_patterns="*/*"))
    raise FileNotFoundError(f"{path}: no such file or folder, and not a Hub id like org/name")


def model_from_gguf(file: GGUFFile, path: Path) -> Model:
    """A model from a parsed GGUF or PowerInfer file: names and row order as in HF, scales checked."""
    # imported at use: it needs this module
    from prosparse.formats import powerinfer_open

    try:
        if file.metadata.get("general.type") == "adapter":
            raise ValueError("an adapter, no model: prosparse convert BASE OUT.gguf --adapter FILE merges it")
        if powerinfer_open.is_powerinfer_model(file):
            return powerinfer_open.model_from_powerinfer(file, path.stem)
        return assembled(file.metadata, dict(file.tensors), path.stem, predictors.from_gguf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def assembled(
    metadata: Mapping[str, Any],
    stored: dict[str, Tensor],
    name: str,
    read_predictors: Callable[[Mapping[str, Any], dict[str, Tensor], ModelConfig], Predictors | None],
) -> Model:
    """A model from GGUF's keys and tensors. `read_predictors` takes theirs out of `stored`; `name` is used if
    the file has none."""
    rope_factors = stored.pop("rope_freqs.weight", None)
    config = ModelConfig.from_gguf(
        metadata,
        tied="output.weight" not in stored,
        rope_factors=() if rope_factors is None else tuple(rope_factors.dequantize().ravel().tolist()),
    )
    predicted = read_predictors(metadata, stored, config)
    tensors = {}
    for gguf_name, tensor in stored.items():
        hf_name = names.from_gguf(gguf_name)
        if hf_name is None:
            raise ValueError(f"tensor {gguf_name} is not part of a {config.architecture} model")
        check_scales(gguf_name, tensor)
        if heads := names.interleaved_heads(config, hf_name):
            tensor = Tensor(tensor.type, tensor.shape, partial(deinterleave, tensor.data, heads))
        tensors[hf_name] = tensor
    raw = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    tokenizer = TokenizerData("gguf" if raw else "none", raw, None)
    given = metadata.get("general.name")
    return Model(config, tensors, tokenizer, given if isinstance(given, str) and given else name, predicted)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a GGUF q or k projection, (first half, second half) of each pair adjacent, in HF order."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `deinterleave`."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
