"""PowerInfer's placement files `<model file>.generated.gpuidx`: which neurons live on the GPU.

Its own solver reads layers in the order of their names as texts, so that from the third layer on most of what
it places is another layer's. Layers are numbers here, and any number of neurons will do.
"""

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prosparse.formats.gguf import INDEX_TYPES, POWERINFER_MAGIC, is_powerinfer, parse_header, write_parts
from prosparse.model.model import BLOCKS, Tensor

SUFFIX = ".generated.gpuidx"
ARCHITECTURE = "generic.gpu_index"
_BLOCK_COUNT, _CAPACITY = "generic.gpu_index.block_count", "split.vram_capacity"
_I32 = next(iter(INDEX_TYPES))
# PowerInfer's Q4_0 kernel for down works through tiles of 256 neurons and leaves out what is over
_Q4_0_GROUP = 256


@dataclass(frozen=True, slots=True)
class Placement:
    """`on_gpu` bool [layers, d_ff]; `capacity`: bytes of GPU memory that PowerInfer must have left for it."""

    on_gpu: np.ndarray
    capacity: int

    def __post_init__(self) -> None:
        if self.on_gpu.dtype != bool or self.on_gpu.ndim != 2 or 0 in self.on_gpu.shape:
            raise ValueError("a placement says for each layer and neuron whether it is on the GPU")
        if not 0 <= self.capacity < 2**64:
            raise ValueError(f"a placement of {self.capacity} bytes is not possible")


def hottest(counts: np.ndarray, n_neurons: int, group: int = 1) -> np.ndarray:
    """bool [layers, d_ff]: the `n_neurons` most active of all layers, of each layer a multiple of `group`.

    `counts` [layers, d_ff]. Within a layer neurons come in the order of their counts, so taking the best
    groups of all layers is the best that can be done. Equal ones: first layers and neurons first.
    """
    layers, d_ff = counts.shape
    order = np.argsort(-counts, axis=1, kind="stable")
    whole = d_ff // group * group
    # in int64 or float64, so that sums of counts are exact or nearly so
    sums = np.take_along_axis(counts, order, 1)[:, :whole].reshape(layers, -1, group).sum(2)
    chosen = np.argsort(-sums, axis=None, kind="stable")[: max(0, n_neurons // group)]
    on_gpu = np.zeros((layers, d_ff), bool)
    for layer, number in zip(*np.unravel_index(chosen, sums.shape), strict=True):
        on_gpu[layer, order[layer, number * group : (number + 1) * group]] = True
    return on_gpu


def place(tensors: Mapping[str, Tensor], counts: np.ndarray, budget: int) -> Placement:
    """The hottest neurons of a PowerInfer model, by its tensors' names and types, that a budget has room for.

    `budget`, in bytes, is what PowerInfer is told (`--vram-budget`). It puts attention, norms, predictors and
    output there first, and needs room for all of them: ValueError if there is none, or if a type of gate, up
    or down has no kernel on the GPU. Memory of the KV cache is not counted.
    """
    layers = sum(name.endswith(".ffn_gate.weight") for name in tensors)
    neurons = [tensors[f"blk.0.ffn_{part}.weight"] for part in ("gate", "up", "down_t")]
    if counts.shape != (layers, neurons[0].shape[0]):
        raise ValueError(
            f"statistics are of (layers, neurons) {counts.shape}, the model has "
            f"{(layers, neurons[0].shape[0])}: run `prosparse stats` on this model"
        )
    for tensor in neurons:
        if tensor.type not in ("F16", "Q4_0"):
            raise ValueError(
                f"PowerInfer keeps F16 and Q4_0 on a GPU, not {tensor.type}: use --type f16 or q4_0"
            )
    if neurons[0].shape[1] % 32:
        raise ValueError(
            f"PowerInfer's kernels for GPUs need rows of a multiple of 32, not {neurons[0].shape[1]}: leave "
            "--vram-budget out"
        )
    per_neuron = sum(t.shape[1] // BLOCKS[t.type][0] * BLOCKS[t.type][1] for t in neurons)
    on_cpu = ("token_embd.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight")
    fixed = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith(on_cpu))
    if budget < fixed:
        raise ValueError(
            f"a budget of {budget / 2**30:.3g} GiB has no room for attention, predictors and output "
            f"({fixed / 2**30:.3g} GiB), and then PowerInfer puts no neuron on the GPU: raise --vram-budget"
        )
    group = _Q4_0_GROUP if any(tensor.type == "Q4_0" for tensor in neurons) else 1
    on_gpu = hottest(counts, (budget - fixed) // per_neuron, group)
    return Placement(on_gpu, int(on_gpu.sum()) * per_neuron)


def write_gpuidx(path: Path, placement: Placement) -> None:
    """Write a placement file; it appears only when complete."""
    layers = len(placement.on_gpu)
    metadata = {
        "general.architecture": ARCHITECTURE,
        _BLOCK_COUNT: layers,
        _CAPACITY: np.uint64(placement.capacity),
    }
    parts = []
    for layer, row in enumerate(placement.on_gpu):
        for name, values in (("gpu_idx", row), ("gpu_bucket", np.flatnonzero(row))):
            data = values.astype("<i4").view(np.uint8)
            parts.append((f"blk.{layer}.{name}", values.shape, _I32, data.nbytes, _constant(data)))
    write_parts(path, metadata, parts, POWERINFER_MAGIC)


def _constant(data: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: data


def read_gpuidx(path: Path) -> Placement:
    """Read a placement file. ValueError unless position and name, by which PowerInfer reads, both fit."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise ValueError(f"{path}: the file is empty")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parse_gpuidx(buffer, str(path))


def parse_gpuidx(buffer: bytes | mmap.mmap, name: str) -> Placement:
    """Parse the bytes of one file; `name` stands in the error messages."""
    metadata, entries, _ = parse_header(buffer, name, INDEX_TYPES)
    if not is_powerinfer(buffer) or metadata.get("general.architecture") != ARCHITECTURE:
        raise ValueError(f"{name}: not a placement file of PowerInfer (general.architecture {ARCHITECTURE})")
    layers, capacity = metadata.get(_BLOCK_COUNT), metadata.get(_CAPACITY)
    for key, value in ((_BLOCK_COUNT, layers), (_CAPACITY, capacity)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}: {key} must be an integer, not {value!r:.80}")
    assert isinstance(layers, int) and isinstance(capacity, int)
    if not layers or len(entries) != 2 * layers:
        raise ValueError(f"{name}: {len(entries)} tensors are not two for each of {layers} layers")
    rows: list[np.ndarray] = []
    for layer in range(layers):
        pair = entries[2 * layer : 2 * layer + 2]
        for entry, part in zip(pair, ("gpu_idx", "gpu_bucket"), strict=True):
            if entry.name != f"blk.{layer}.{part}" or len(entry.shape) != 1:
                raise ValueError(f"{name}: tensor {2 * layer} must be the list blk.{layer}.{part}")
        index, bucket = (np.frombuffer(buffer, "<i4", entry.shape[0], entry.start) for entry in pair)
        if len(index) != pair[0].shape[0] or not np.isin(index, (0, 1)).all():
            raise ValueError(f"{name}: blk.{layer}.gpu_idx holds something other than 0 and 1")
        if not np.array_equal(np.flatnonzero(index), bucket):
            raise ValueError(
                f"{name}: blk.{layer}.gpu_bucket does not list the neurons of blk.{layer}.gpu_idx"
            )
        if not len(index) or len(index) != len(rows[0] if rows else index):
            raise ValueError(f"{name}: blk.{layer}.gpu_idx has {len(index)} neurons, unlike the first layer")
        rows.append(index == 1)
    return Placement(np.array(rows), capacity)
