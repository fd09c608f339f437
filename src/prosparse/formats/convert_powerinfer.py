"""`prosparse convert --powerinfer`: a model, its activation statistics and placement for PowerInfer."""

import zipfile
from pathlib import Path

import numpy as np

from prosparse.formats import activation_pt, gpuidx
from prosparse.formats.convert import provenance
from prosparse.formats.open import open_model
from prosparse.formats.powerinfer import prepare


def convert_for_powerinfer(
    source: str | Path,
    target: str | Path,
    kind: str | None = None,
    *,
    pure: bool = False,
    as_relu: bool = False,
    statistics: str | Path | None = None,
    vram_budget: float | None = None,
) -> tuple[int, tuple[str, ...]]:
    """Convert the model at `source` to a file that PowerInfer runs: (bytes of its tensors, notes for users).

    `statistics`, a folder of `prosparse stats` or of activation_N.pt, is written beside it as
    `activation/activation_N.pt`; with `vram_budget` (GiB) also the placement of neurons,
    TARGET.generated.gpuidx. The model file comes last. For `kind`, `pure` and `as_relu` see `prepare`.
    """
    target = Path(target)
    if target.suffix != ".gguf":
        raise ValueError(f"a PowerInfer model is one file: let {target} end in .gguf")
    if vram_budget is not None and statistics is None:
        raise ValueError("--vram-budget places neurons by how active they are: give --activation-stats DIR")
    if vram_budget is not None and not 0 < vram_budget < 2**20:
        raise ValueError(f"--vram-budget is a size in GiB, not {vram_budget}")
    model = open_model(source)
    prepared = prepare(model, kind, pure=pure, as_relu=as_relu, more=provenance(source))
    placement_file = target.with_name(target.name + gpuidx.SUFFIX)
    notes = list(prepared.notes)
    if statistics is not None:
        counts = _activation_counts(Path(statistics))
        expected = model.config.num_hidden_layers, model.config.intermediate_size
        if counts.shape != expected:
            raise ValueError(
                f"{statistics} is of (layers, neurons) {counts.shape}, the model has {expected}: run "
                "`prosparse stats` on this model"
            )
        placement = None
        if vram_budget is not None:
            placement = gpuidx.place(prepared.tensors, counts, int(vram_budget * 2**30))
        activation_pt.write_activations(activation_pt.folder_of(target), counts)
        if placement is not None:
            gpuidx.write_gpuidx(placement_file, placement)
            share = placement.on_gpu.mean()
            notes.append(f"{share:.1%} of the neurons are placed on the GPU: {placement_file}")
    if vram_budget is None and placement_file.exists():
        notes.append(
            f"{placement_file} is of an earlier file, and PowerInfer will use it: remove it if in doubt"
        )
    prepared.write(target)
    return prepared.size_bytes, tuple(notes)


def _activation_counts(folder: Path) -> np.ndarray:
    """[layers, d_ff]: how often each neuron was active."""
    if (folder / "activation_0.pt").exists():
        return activation_pt.read_activations(folder)
    # as `prosparse stats` writes it: see docs/formats.md, "Results"
    try:
        with np.load(folder / "stats.npz", allow_pickle=False) as found:
            return np.asarray(found["pooled"])
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder / 'stats.npz'} is not what `prosparse stats` writes: {error}") from None
