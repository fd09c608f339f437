"""What predictors learn from: the inputs of every FFN on some text, and which of its neurons were active.

A collection is a folder DIR/collected/KEY: `meta.json`, and per layer L `normed.L` and `residual.L` (float16
[tokens, d]), `active.L` and `clipped.L` (bits, uint8 [tokens, ceil(d_ff / 8)], lowest bit first).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prosparse.formats.files import written_whole
from prosparse.model.model import Model
from prosparse.model.predictor import INPUTS, Input
from prosparse.sparsify import measure
from prosparse.sparsify.batches import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from prosparse.sparsify.hf_model import Trunk

Part = Literal["train", "calibrate", "report"]
PARTS: tuple[Part, ...] = ("train", "calibrate", "report")
_VERSION = 1  # of the files
_FLUSH = 4096  # tokens between two notes of how far it is


@dataclass(frozen=True, slots=True)
class Settings:
    """What is collected. ValueError for shares that leave nothing to train on."""

    tokens: int = 65536  # of each source
    context: int = 1024  # tokens a sequence
    inputs: tuple[Input, ...] = ("normed",)
    clip: float | None = None  # also the labels of the paper: this share of the neurons, by |x1| (0.15)
    held_out: float = 0.05  # share of each source's sequences that calibrates, and again that is reported on
    max_gb: float = 64.0  # of disk

    def __post_init__(self) -> None:
        if not self.inputs or not set(self.inputs) <= set(INPUTS):
            raise ValueError(f"inputs are {' and '.join(INPUTS)}, not {self.inputs}")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"clip must be a share of the neurons, not {self.clip}")
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"the held-out share must be above 0 and below a half, not {self.held_out}")


class Collection:
    """A finished collection, mapped. `sizes`: tokens of each part, in the order of PARTS."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.folder = folder
        self.layers, self.d, self.d_ff = meta["layers"], meta["d"], meta["d_ff"]
        self.sizes: dict[str, int] = meta["sizes"]
        self.clip: float | None = meta["clip"]
        self.key: str = meta["key"]
        self._tokens = sum(self.sizes.values())

    def inputs(self, layer: int, kind: Input, part: Part) -> np.ndarray:
        """float16 [tokens of the part, d], mapped."""
        return self._map(f"{kind}.{layer}", np.float16, self.d)[self._slice(part)]

    def active(self, layer: int, part: Part, *, clipped: bool = False) -> np.ndarray:
        """Bits, uint8 [tokens of the part, ceil(d_ff / 8)], mapped: x1 != 0, or the clipped labels."""
        name = "clipped" if clipped else "active"
        return self._map(f"{name}.{layer}", np.uint8, -(-self.d_ff // 8))[self._slice(part)]

    def _slice(self, part: Part) -> slice:
        start = sum(self.sizes[before] for before in PARTS[: PARTS.index(part)])
        return slice(start, start + self.sizes[part])

    def _map(self, name: str, dtype: type, width: int) -> np.ndarray:
        return np.memmap(self.folder / name, dtype, "r", shape=(self._tokens, width))


def pack(active: np.ndarray) -> np.ndarray:
    """bool [n, d_ff] as uint8 [n, ceil(d_ff / 8)], lowest bit first."""
    return np.packbits(active, axis=-1, bitorder="little")


def unpack(bits: np.ndarray, d_ff: int) -> np.ndarray:
    """bool [n, d_ff] of packed bits."""
    return np.unpackbits(bits, axis=-1, count=d_ff, bitorder="little").view(bool)


def split(batches: Sequence[Batch], held_out: float) -> dict[Part, Batch]:
    """Whole sequences of every source for training, calibration and the report, in this order in the text.

    ValueError for a source of fewer than three sequences.
    """
    parts: dict[Part, list[Batch]] = {part: [] for part in PARTS}
    for batch in batches:
        n = len(batch.tokens)
        if n < 3:
            raise ValueError(f"a source has {n} sequences, 3 are needed: more --tokens or a lower --context")
        kept = max(1, round(held_out * n))
        train, rest = measure.split(batch, n - 2 * kept)
        parts["train"].append(train)
        calibrate, report = measure.split(rest, kept)
        parts["calibrate"].append(calibrate)
        parts["report"].append(report)
    return {part: measure.join(found) for part, found in parts.items()}


def disk_bytes(layers: int, d: int, d_ff: int, tokens: int, settings: Settings) -> int:
    """What a collection takes."""
    per_token = 2 * d * len(settings.inputs) + -(-d_ff // 8) * (1 if settings.clip is None else 2)
    return layers * per_token * tokens


def fingerprint(model: Model) -> str:
    """Changes with the configuration and the weights: of every tensor, some bytes from all over it."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.tensors.items()):
        flat = tensor.data.reshape(-1)
        digest.update(f"{name} {tensor.type} {tensor.shape}".encode())
        digest.update(flat[:: max(1, len(flat) // 4096)].tobytes())
    return digest.hexdigest()[:16]


def collect(
    trunk: "Trunk",
    parts: dict[Part, Batch],
    cache: Path,
    settings: Settings,
    *,
    model: str,
    micro: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Collection:
    """The collection of a model (`model`: its `fingerprint`) on `parts`, made unless `cache` has it.

    An interrupted one goes on after its last note. Products are float32. `progress(tokens, of all)` is
    called on the way. ValueError if the disk would not hold it, or for a number that is not finite or beyond
    float16.
    """
    if micro < 1:
        raise ValueError(f"--micro must be at least 1, not {micro}")
    joined = measure.join([parts[part] for part in PARTS])
    d_ff, d = trunk.mlps[0].gate_proj.weight.shape
    context = joined.tokens.shape[1] - 1
    described: dict[str, Any] = {
        "version": _VERSION,
        "model": model,
        "tokens_sha256": hashlib.sha256(joined.tokens.tobytes()).hexdigest(),
        "inputs": sorted(settings.inputs),
        "clip": settings.clip,
        "sizes": {part: len(parts[part].tokens) * context for part in PARTS},
        "layers": len(trunk.mlps),
        "d": d,
        "d_ff": d_ff,
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    folder, part_folder = cache / key, cache / f".{key}.part"
    if found := _found(cache, described):
        return Collection(found)
    tokens = len(joined.tokens) * context
    part_folder.mkdir(parents=True, exist_ok=True)
    note = part_folder / "done.json"
    done = json.loads(note.read_text())["sequences"] if note.exists() else 0
    _check_space(part_folder, disk_bytes(len(trunk.mlps), d, d_ff, tokens, settings), settings, bool(done))
    files = _Files(part_folder, len(trunk.mlps), tokens, d, d_ff, settings)
    noted = done
    for first, seen in _run(trunk, joined.tokens, done, micro, settings):
        files.write(first * context, seen)
        done = min(first + micro, len(joined.tokens))
        if (done - noted) * context >= _FLUSH or done == len(joined.tokens):
            files.flush()
            with written_whole(note) as file:
                file.write(json.dumps({"sequences": done}).encode())
            noted = done
        if progress:
            progress(done * context, tokens)
    with written_whole(part_folder / "meta.json") as file:
        file.write(json.dumps(described | {"key": key, "settings": asdict(settings)}, indent=1).encode())
    note.unlink()
    part_folder.rename(folder)
    return Collection(folder)


def _found(cache: Path, wanted: dict[str, Any]) -> Path | None:
    """A finished collection of the same model and text that holds what is wanted, and perhaps more."""
    for path in sorted(cache.glob("[!.]*/meta.json")):
        meta = json.loads(path.read_text())
        if all(
            meta.get(name) == value for name, value in wanted.items() if name not in ("inputs", "clip")
        ) and (set(wanted["inputs"]) <= set(meta["inputs"]) and wanted["clip"] in (None, meta["clip"])):
            return path.parent
    return None


def _check_space(folder: Path, needed: int, settings: Settings, begun: bool) -> None:
    if needed > settings.max_gb * 1e9:
        raise ValueError(
            f"the activations take {needed / 1e9:.2f} GB, the limit is {settings.max_gb:g}: lower --tokens "
            "or raise --max-gb"
        )
    free = shutil.disk_usage(folder).free
    if not begun and needed > free:
        raise ValueError(
            f"the activations take {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free: lower "
            "--tokens"
        )


class _Files:
    """The arrays of a collection being made; all have their full size from the start."""

    def __init__(self, folder: Path, layers: int, tokens: int, d: int, d_ff: int, settings: Settings) -> None:
        widths: dict[str, tuple[type, int]] = {name: (np.float16, d) for name in settings.inputs}
        widths["active"] = (np.uint8, -(-d_ff // 8))
        if settings.clip is not None:
            widths["clipped"] = widths["active"]
        self._maps = {}
        for name, (dtype, width) in widths.items():
            for layer in range(layers):
                path = folder / f"{name}.{layer}"
                with path.open("ab") as file:
                    # a full disk is an error here, but kills a process that writes to a mapping
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, tokens * width * np.dtype(dtype).itemsize)
                self._maps[name, layer] = np.memmap(path, dtype, "r+", shape=(tokens, width))

    def write(self, start: int, seen: dict[tuple[str, int], np.ndarray]) -> None:
        assert seen.keys() == self._maps.keys(), "a layer did not run"
        for key, rows in seen.items():
            self._maps[key][start : start + len(rows)] = rows

    def flush(self) -> None:
        for mapped in self._maps.values():
            mapped.flush()


def _run(
    trunk: "Trunk", tokens: np.ndarray, first: int, micro: int, settings: Settings
) -> Iterator[tuple[int, dict[tuple[str, int], np.ndarray]]]:
    """(first sequence, arrays by (name, layer)) of `micro` sequences at a time."""
    import torch

    if (top := int(tokens.max())) >= trunk.head.shape[0]:
        raise ValueError(f"the sample holds token {top}, the model knows {trunk.head.shape[0]}")
    seen: dict[tuple[str, int], np.ndarray] = {}

    def keep(name: str, layer: int, x: "Tensor") -> None:
        if not x.isfinite().all():
            raise ValueError(f"layer {layer} has activations that are not finite: the model is broken")
        if name in INPUTS:
            half = x.flatten(0, -2).half()
            if not half.isfinite().all():
                raise ValueError(f"the {name} inputs of layer {layer} are beyond float16 (65504)")
            seen[name, layer] = half.cpu().numpy()
            return
        x1 = x.flatten(0, -2)
        seen["active", layer] = pack((x1 != 0).cpu().numpy())
        if settings.clip is not None:
            seen["clipped", layer] = pack(clipped(x1, settings.clip).cpu().numpy())

    with watching(trunk, keep, settings.inputs), torch.no_grad():
        for start in range(first, len(tokens), micro):
            part = torch.from_numpy(tokens[start : start + micro, :-1]).to(trunk.head.device)
            trunk.hidden(part)
            yield start, seen
            seen.clear()


def clipped(x1: "Tensor", share: float) -> "Tensor":
    """bool [n, d_ff]: of each token the int(share * d_ff) neurons of the greatest |x1|, zeros never.

    Labels of the published predictors ("clip15"; Raincleared-Song/DejaVu_predictor): fewer candidates for a
    lower recall.
    """
    import torch

    size = x1.abs()
    kept = torch.zeros_like(x1, dtype=torch.bool)
    kept.scatter_(-1, size.topk(int(share * x1.shape[-1]), dim=-1).indices, True)
    return kept & (size > 0)


@contextmanager
def watching(
    trunk: "Trunk", keep: Callable[[str, int, "Tensor"], None], inputs: Sequence[Input]
) -> Iterator[None]:
    """`keep(name, layer, x)` sees the residual stream before every FFN's norm ("residual") and what its gate
    sees ("normed"), as far as `inputs` names them, and x1 ("active"). The model is in evaluation mode; what
    was there before comes back."""
    modes = [(module, module.training) for module in trunk.model.modules()]
    observers = [mlp.observe for mlp in trunk.mlps]
    hooks = []
    try:
        trunk.model.eval()
        for layer, (mlp, decoder) in enumerate(zip(trunk.mlps, trunk.layers, strict=True)):
            mlp.observe = partial(keep, "active", layer)
            for name in inputs:
                module = ffn_norm(decoder) if name == "residual" else mlp
                hooks.append(module.register_forward_pre_hook(_first(partial(keep, name, layer))))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        for mlp, before in zip(trunk.mlps, observers, strict=True):
            mlp.observe = before


def _first(keep: Callable[["Tensor"], None]) -> Callable[[Any, Any], None]:
    return lambda _, inputs: keep(inputs[0])


def ffn_norm(decoder: Any) -> Any:
    """The norm before the FFN, whose input is the residual stream. ValueError where it has another name."""
    norm = getattr(decoder, "post_attention_layernorm", None)
    if norm is None or hasattr(decoder, "pre_feedforward_layernorm"):
        raise ValueError(f"{type(decoder).__name__} has no post_attention_layernorm before its FFN")
    return norm
