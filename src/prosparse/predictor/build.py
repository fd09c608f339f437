"""Predictors of a whole model from a collection: trained layer by layer, quantised, calibrated."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from prosparse.formats.files import written_whole
from prosparse.model.model import BLOCKS, Model
from prosparse.model.predictor import Input, Predictors
from prosparse.predictor import metrics, ranks
from prosparse.predictor.collect import Collection
from prosparse.predictor.networks import scorer, stored, weights_of
from prosparse.predictor.train import (
    Examples,
    Networks,
    Training,
    balanced,
    train_lowrank,
    train_published,
    untrained,
    weighted,
)
from prosparse.sparsify.swap import activate

Way = Literal["lowrank", "published", "sketch", "sign"]
WAYS: tuple[Way, ...] = ("lowrank", "published", "sketch", "sign")
RECALLS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
_TOKENS = 4096  # from which importance is taken
_DOWN = "model.layers.{}.mlp.down_proj.weight"
_NORM = "model.layers.{}.post_attention_layernorm.weight"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which predictors. `way` published is a network trained as published; the others are kinds of
    `Predictors`. `rank` or `budget` (share of the gate's bytes) for networks; `training.rank` is not used."""

    way: Way = "lowrank"
    input: Input = "normed"
    recalls: tuple[float, ...] = RECALLS
    default: float = 0.97
    type: str = "Q8_0"  # of networks
    rank: int | None = None
    budget: float | None = None
    clipped: bool = False  # labels of the published: the 15 % greatest |x1| only
    importance: float = 1.0  # lowrank: exponent of what a missed neuron costs; 0 counts all alike
    sketch: str = "Q4_0"
    training: Training = field(default_factory=lambda: Training(1))

    def __post_init__(self) -> None:
        if self.networks and (self.rank is None) == (self.budget is None):
            raise ValueError("give --rank or --budget, one of them")
        block = BLOCKS[self.type][0]
        if self.rank is not None and (self.rank < 1 or self.rank % block):
            raise ValueError(
                f"--rank {self.rank} is no multiple of {block}, {self.type}'s block: choose another "
                "--rank, or --type f16"
            )
        if not 0 <= self.importance < 10:
            raise ValueError(f"--importance is an exponent from 0 on, not {self.importance}")
        if self.budget is not None and not 0 < self.budget < 10:
            raise ValueError(f"--budget is a share of the gate's bytes, not {self.budget}")

    @property
    def networks(self) -> bool:
        return self.way in ("lowrank", "published")


def build(
    model: Model,
    collection: Collection,
    wanted: Wanted,
    cache: Path,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Predictors:
    """Predictors of `model`, calibrated on the collection's part "calibrate".

    Trained networks are kept in `cache`, a file a layer, and found again. `progress(layers done, layers, what
    goes on)`. ValueError for settings that do not fit the model and for numbers that are not finite.
    """
    config = model.config
    layers = config.num_hidden_layers
    if not config.activation.sparse:
        raise ValueError(
            f"{config.activation.name} has no inactive neurons to predict: make the model sparse first "
            "(prosparse sparsify)"
        )
    networks = []
    if wanted.networks:
        chosen = layer_ranks(model, collection, wanted, device, progress)
        for layer, rank in enumerate(chosen):
            pair = _trained(model, collection, wanted, rank, layer, cache, device, progress)
            if wanted.way == "lowrank":
                given = examples(model, collection, wanted, layer)
                cost = importance(model, given, wanted.input, layer, device) ** wanted.importance
                pair = balanced(weighted(pair, given, cost, wanted.default, device))
            networks.append((stored(pair[0], wanted.type), stored(pair[1], wanted.type)))
    recalls = tuple(sorted({*wanted.recalls, wanted.default}))
    nothing = tuple(0.0 for _ in recalls)
    predictors = Predictors(
        kind="lowrank" if wanted.way == "published" else wanted.way,
        input=wanted.input if wanted.networks else "normed",
        recalls=recalls,
        thresholds=(nothing,) * layers,
        default=wanted.default,
        networks=tuple(networks),
        sketch=wanted.sketch,
    )
    thresholds = []
    for layer in range(layers):
        score = scorer(predictors.kind, weights_of(predictors, model, layer), device)
        inputs = collection.inputs(layer, predictors.input, "calibrate")
        thresholds.append(metrics.calibrate(score, inputs, collection.active(layer, "calibrate"), recalls))
        if progress:
            progress(layer + 1, layers, "calibrating")
    return replace(predictors, thresholds=tuple(thresholds))


def layer_ranks(
    model: Model,
    collection: Collection,
    wanted: Wanted,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> list[int]:
    """The rank of each layer: `wanted.rank`, or what the budget gives, by untrained starts."""
    layers = model.config.num_hidden_layers
    if wanted.rank is not None:
        return [wanted.rank] * layers
    assert wanted.budget is not None, "Wanted checks it"
    even = ranks.uniform(model, wanted.budget, wanted.type)
    tried = ranks.ladder(even, wanted.type)
    if wanted.way == "published" or len(tried) == 1:
        return [even] * layers
    table = []
    for layer in range(layers):
        given = examples(model, collection, wanted, layer)
        gate = _from_inputs(model, "gate", wanted.input, layer)
        table.append(untrained(given, gate, model.config.activation.param, wanted.default, tried, device))
        if progress:
            progress(layer + 1, layers, "choosing ranks")
    return ranks.allocate(table, tried, even)


def examples(model: Model, collection: Collection, wanted: Wanted, layer: int) -> Examples:
    """What the networks of a layer learn from."""
    clipped = wanted.clipped and wanted.way == "published"
    return Examples(
        collection.inputs(layer, wanted.input, "train"),
        collection.active(layer, "train", clipped=clipped),
        collection.inputs(layer, wanted.input, "calibrate"),
        collection.active(layer, "calibrate", clipped=clipped),
        model.config.intermediate_size,
        unit=wanted.input == "residual" and wanted.way == "lowrank",
    )


def importance(
    model: Model, given: Examples, kind: Input, layer: int, device: torch.device | str = "cpu"
) -> np.ndarray:
    """float32 [d_ff]: what a layer's output loses on average where an active neuron is missed, the mean of
    |x1_j| over its active tokens times |down_j|, over the geometric mean of all neurons. Neurons that were
    seldom seen active count as a thousandth of the mean at least."""
    stride = max(1, len(given.inputs) // _TOKENS)
    x = given.given(torch.from_numpy(given.inputs[::stride].astype(np.float32)).to(device))
    gate, up = (
        x @ torch.from_numpy(_from_inputs(model, part, kind, layer)).to(device).T for part in ("gate", "up")
    )
    down = torch.from_numpy(model.tensors[_DOWN.format(layer)].dequantize()).to(device)
    activation = model.config.activation
    x1 = activate(activation.name, gate, activation.param) * up
    cost = x1.abs().sum(0) / (x1 != 0).sum(0).clamp_min(1) * down.norm(dim=0)
    if not cost.isfinite().all():
        raise ValueError(f"layer {layer}: activations are not finite: the model is broken")
    cost = cost.clamp_min(1e-3 * float(cost.mean()) + 1e-30)
    return (cost / cost.log().mean().exp()).cpu().numpy()


def _from_inputs(model: Model, part: str, kind: Input, layer: int) -> np.ndarray:
    """The gate or up matrix that acts on a layer's inputs as they are learnt from."""
    matrix = model.tensors[f"model.layers.{layer}.mlp.{part}_proj.weight"].dequantize()
    if kind == "residual":
        matrix = matrix * model.tensors[_NORM.format(layer)].dequantize()
    return matrix


def _trained(
    model: Model,
    collection: Collection,
    wanted: Wanted,
    rank: int,
    layer: int,
    cache: Path,
    device: torch.device | str,
    progress: Callable[[int, int, str], None] | None,
) -> Networks:
    """The float networks of a layer, trained unless the cache has them."""
    training = replace(wanted.training, rank=rank, seed=wanted.training.seed + layer)
    described = {
        "version": 1,
        "collection": collection.key,
        "way": wanted.way,
        "input": wanted.input,
        "clipped": wanted.clipped,
        "recall": wanted.default if wanted.way == "lowrank" else None,
        "training": asdict(training),
        "layer": layer,
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / f"{wanted.way}-{layer:03}-{key}.npz"
    layers = model.config.num_hidden_layers
    if path.exists():
        return _read(path)

    def show(epoch: int, value: float) -> None:
        what = "recall" if wanted.way == "published" else f"predicted sparsity at recall {wanted.default:g}"
        if progress:
            progress(layer, layers, f"layer {layer} rank {rank} epoch {epoch}: {what} {value:.3f}")

    given = examples(model, collection, wanted, layer)
    try:
        if wanted.way == "published":
            networks = train_published(given, training, device, show)
        else:
            threshold = model.config.activation.param
            gate = _from_inputs(model, "gate", wanted.input, layer)
            networks = train_lowrank(given, gate, threshold, wanted.default, training, device, show)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from None
    if not all(np.isfinite(weight).all() for weight in networks):
        raise ValueError(f"layer {layer}: the trained weights are not finite: lower the learning rate")
    with written_whole(path) as file:
        np.savez(file, fc1=networks[0], fc2=networks[1])
    return networks


def _read(path: Path) -> Networks:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["fc1"], arrays["fc2"]
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to train that layer again") from None
