"""Predictors in model files: keys and tensors of a GGUF, two files of a Hugging Face folder.

All or nothing: a part that is missing, unknown or of another shape is a ValueError that names it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats.files import written_whole
from prosparse.formats.quants import check_scales
from prosparse.formats.safetensors import read_safetensors, write_safetensors
from prosparse.model.config import ModelConfig
from prosparse.model.model import BLOCKS, Tensor
from prosparse.model.predictor import Predictors

PREFIX = "prosparse.predictor."
_KEYS = ("kind", "input", "recalls", "thresholds", "default", "sketch")
_GGUF_NAMES = ("blk.{}.ffn_pred_1.weight", "blk.{}.ffn_pred_2.weight")
_HF_NAMES = ("model.layers.{}.fc1.weight", "model.layers.{}.fc2.weight")
_GGUF_PATTERN = re.compile(r"blk\.\d+\.ffn_pred_[12]\.weight")
_WEIGHTS, _SETTINGS = "predictors.safetensors", "predictors.json"


def gguf_metadata(predictors: Predictors) -> dict[str, Any]:
    """The keys `prosparse.predictor.*`. ValueError for what 32 bits cannot hold.

    `thresholds` is one float32 array, layer by layer, in the order of `recalls`.
    """
    recalls = np.array(predictors.recalls, np.float32)
    with np.errstate(over="ignore"):
        thresholds = np.array(predictors.thresholds, np.float32).ravel()
    if len(set(recalls.tolist())) < len(recalls) or not np.isfinite(thresholds).all():
        raise ValueError("recalls or thresholds of the predictors do not fit into 32 bits")
    values = {
        "kind": predictors.kind,
        "input": predictors.input,
        "recalls": recalls,
        "thresholds": thresholds,
        "default": float(predictors.default),
        "sketch": predictors.sketch,
    }
    return {f"{PREFIX}{key}": value for key, value in values.items()}


def gguf_tensors(predictors: Predictors) -> dict[str, Tensor]:
    """The networks by GGUF name."""
    return _by_name(predictors, _GGUF_NAMES)


def hf_tensors(predictors: Predictors) -> dict[str, Tensor]:
    """The networks by the names they have in `predictors.safetensors`."""
    return _by_name(predictors, _HF_NAMES)


def from_gguf(
    metadata: Mapping[str, Any], stored: dict[str, Tensor], config: ModelConfig
) -> Predictors | None:
    """The predictors of a GGUF file, or None. Their tensors are taken out of `stored`.

    float32 recalls come back as the shortest decimals (0.95), thresholds as exactly what is stored.
    """
    found = {name: stored.pop(name) for name in [*stored] if _GGUF_PATTERN.fullmatch(name)}
    if not any(key.startswith(PREFIX) for key in metadata):
        if found:
            raise ValueError(f"tensor {min(found)} is there, but {PREFIX}kind is missing")
        return None
    networks = take_networks(found, _GGUF_NAMES, config) if found else ()
    if found:
        raise ValueError(f"tensor {min(found)} is not part of a predictor of this model")
    return from_keys(metadata, networks, config)


def from_keys(
    metadata: Mapping[str, Any], networks: tuple[tuple[Tensor, Tensor], ...], config: ModelConfig
) -> Predictors:
    """What the keys `prosparse.predictor.*` describe, for a model of this configuration."""
    values = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
    if unknown := sorted(values.keys() - set(_KEYS)):
        raise ValueError(f"{PREFIX}{unknown[0]} is not known: was the file made by a later version?")
    for key in _KEYS:
        if key not in values:
            raise ValueError(f"{PREFIX}{key} is missing")
    for key in ("recalls", "thresholds"):
        if not isinstance(values[key], np.ndarray) or values[key].dtype != np.float32:
            raise ValueError(f"{PREFIX}{key} must be an array of float32")
    if not isinstance(values["default"], float):
        raise ValueError(f"{PREFIX}default must be a number, not {values['default']!r:.80}")
    recalls = [float(str(value)) for value in values["recalls"]]
    thresholds, layers = values["thresholds"], config.num_hidden_layers
    if not recalls or len(thresholds) != layers * len(recalls):
        raise ValueError(
            f"{PREFIX}thresholds has {len(thresholds)} values, not one for each of {layers} layers and "
            f"{len(recalls)} recalls"
        )
    with np.errstate(over="ignore"):
        default = float(str(np.float32(values["default"])))
    by_layer = thresholds.reshape(layers, -1).tolist()
    return _made({**values, "recalls": recalls, "thresholds": by_layer, "default": default}, networks, config)


def take_networks(
    found: dict[str, Tensor], names: tuple[str, str], config: ModelConfig
) -> tuple[tuple[Tensor, Tensor], ...]:
    """(fc1, fc2) of each layer, taken out of `found`. ValueError for one that is missing or damaged."""
    networks = []
    for layer in range(config.num_hidden_layers):
        pair = []
        for pattern in names:
            name = pattern.format(layer)
            if name not in found:
                raise ValueError(f"tensor {name} is missing: every layer needs its predictor")
            tensor = found.pop(name)
            if len(tensor.shape) != 2:
                raise ValueError(f"tensor {name} has shape {tensor.shape}: a matrix is needed")
            check_scales(name, tensor)
            pair.append(tensor)
        networks.append((pair[0], pair[1]))
    return tuple(networks)


def write_folder(folder: Path, predictors: Predictors) -> None:
    """Writes `predictors.json` into an HF folder, and before it the networks, if there are any."""
    if predictors.networks:
        write_safetensors(folder / _WEIGHTS, hf_tensors(predictors))
    values = {key: getattr(predictors, key) for key in _KEYS}
    with written_whole(folder / _SETTINGS) as file:
        file.write(json.dumps(values, indent=1, allow_nan=False).encode() + b"\n")


def read_folder(folder: Path, config: ModelConfig) -> Predictors | None:
    """The predictors of an HF folder, or None."""
    path = folder / _SETTINGS
    if not path.is_file():
        if (folder / _WEIGHTS).exists():
            raise ValueError(f"{folder / _WEIGHTS} is there, but {_SETTINGS} is missing")
        return None
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    try:
        _check_json(values)
        found = read_safetensors(folder / _WEIGHTS) if (folder / _WEIGHTS).is_file() else {}
        networks = take_networks(found, _HF_NAMES, config) if found else ()
        if found:
            raise ValueError(f"tensor {min(found)} is not part of a predictor of this model")
        return _made(values, networks, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_json(values: Any) -> None:
    if not isinstance(values, dict) or values.keys() != set(_KEYS):
        raise ValueError(f"it must hold {', '.join(_KEYS)} and nothing else")
    rows = [values["recalls"], [values["default"]]]
    rows += values["thresholds"] if isinstance(values["thresholds"], list) else [None]
    for row in rows:
        if not isinstance(row, list) or not all(type(v) in (int, float) and abs(v) < 1e38 for v in row):
            raise ValueError("recalls and default must be numbers, thresholds a list of numbers by layer")


def _made(
    values: Mapping[str, Any], networks: tuple[tuple[Tensor, Tensor], ...], config: ModelConfig
) -> Predictors:
    """Predictors from checked numbers and any texts."""
    sketch = values["sketch"]
    if not isinstance(sketch, str) or sketch not in BLOCKS:
        raise ValueError(f"the sketch type {sketch!r:.80} of the predictors is not known")
    predictors = Predictors(
        kind=values["kind"],
        input=values["input"],
        recalls=tuple(map(float, values["recalls"])),
        thresholds=tuple(tuple(map(float, row)) for row in values["thresholds"]),
        default=float(values["default"]),
        networks=networks,
        sketch=sketch,
    )
    predictors.check(config)
    return predictors


def _by_name(predictors: Predictors, names: tuple[str, str]) -> dict[str, Tensor]:
    return {
        pattern.format(layer): tensor
        for layer, pair in enumerate(predictors.networks)
        for pattern, tensor in zip(names, pair, strict=True)
    }


def describe(predictors: Predictors) -> dict[str, Any]:
    """What `inspect` shows, ready for JSON."""
    return {
        "kind": predictors.kind,
        "input": predictors.input,
        "recalls": list(predictors.recalls),
        "default": predictors.default,
        "thresholds": [float(value) for value in predictors.at()],
        "ranks": [fc1.shape[0] for fc1, _ in predictors.networks],
        "sketch": predictors.sketch if predictors.kind == "sketch" else None,
        "bytes": sum(tensor.nbytes for pair in predictors.networks for tensor in pair),
    }
