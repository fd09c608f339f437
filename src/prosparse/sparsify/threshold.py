"""`prosparse threshold`: FATReLU thresholds of a trained model, chosen by what they cost in perplexity.

No training: the paper's last step (arXiv 2402.13516, Eq. 3 and Appendix O), and two ways of one a layer.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prosparse import __version__, options
from prosparse.model.activation import Activation
from prosparse.sparsify import measure
from prosparse.sparsify.batches import Batch

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk

METHODS = {
    "grid": "one threshold for all layers",
    "quantile": "open gates closed",
    "cett": "FFN output dropped",
}
PAPER = (0.005, 0.01, 0.02, 0.03)  # Appendix O
_SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the model's own open gates, beside the paper's values
_QUANTILES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
_CETTS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
_CALIBRATION = 4  # the first of so many parts of each source calibrates, the others are for perplexity


@dataclass(frozen=True, slots=True)
class Point:
    """What thresholds do on the evaluation text. `ratio`: perplexity over that of the model as given."""

    method: str  # one of METHODS, or "given"
    parameter: float
    thresholds: tuple[float, ...]  # by layer, as float32
    loss: float  # nats a token
    ppl: float
    ratio: float
    sparsity: float  # mean over layers
    layer_sparsity: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Search:
    """`given` is the model as it came; `pick` the sparsest of it and `points` within the limit."""

    given: Point
    points: tuple[Point, ...]
    pick: Point


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Raises the FATReLU thresholds of a ReLU or FATReLU model without training, and picks the sparsest "
        "whose perplexity stays within a limit."
    )
    measure.add_arguments(parser)
    add = parser.add_argument
    add("--method", action="append", metavar="M[,M]", help=f"{', '.join(METHODS)} [all]")
    add("--grid", type=numbers, metavar="T,...", help="thresholds [the paper's and wider ones, by the model]")
    add(
        "--quantile",
        type=numbers,
        metavar="P,...",
        help=f"shares of a layer's open gates {_shown(_QUANTILES)}",
    )
    add("--cett", type=numbers, metavar="C,...", help=f"dropped shares of a layer's output {_shown(_CETTS)}")
    add("--max-ppl", type=float, default=1.01, metavar="X", help="limit: times the given perplexity [1.01]")
    add("--refine", type=int, default=3, metavar="N", help="halvings towards the limit, each method [3]")
    add(
        "--type",
        default="bf16",
        choices=("f32", "f16", "bf16"),
        help="of the weights that are written [bf16]",
    )


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _shown(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:g}' for value in values)}]"


def main(args: argparse.Namespace) -> int:
    result = threshold(args)
    if args.json:
        options.print_json(result)
    return 0


def threshold(args: argparse.Namespace) -> dict[str, Any]:
    """The search and its results; `args.out` gets `threshold.json`, `threshold.png` and `model/`."""
    from prosparse.formats import open_model
    from prosparse.formats.files import written_whole
    from prosparse.formats.hf import write_folder

    chosen = methods(args.method)
    folder = args.out / "model"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists: name a new folder with --out")
    original = open_model(args.model)
    activation = searchable(original.config.activation)
    calibration, evaluation = parts(measure.samples(args, original))
    trunk, bfloat16 = measure.load(original, args.device, activation)
    values = {name: getattr(args, name) for name in chosen}
    print(f"{'method':<10}{'value':>9}{'sparsity':>10}{'perplexity':>12}{'ratio':>9}")
    found = search(
        trunk,
        calibration,
        evaluation,
        values,
        max_ppl=args.max_ppl,
        refine=args.refine,
        micro=args.micro,
        bfloat16=bfloat16,
        on_point=_show,
    )
    described = {
        "prosparse": __version__,
        "model": str(args.model),
        "activation": asdict(original.config.activation),
        "data": args.data,
        "context": args.context,
        "calibration_tokens": calibration.tokens[:, 1:].size,
        "evaluation_tokens": evaluation.tokens[:, 1:].size,
        "device": str(trunk.head.device),
        "bfloat16": bfloat16,
        "max_ppl": args.max_ppl,
        **asdict(found),
    }
    with written_whole(args.out / "threshold.json") as file:
        file.write(json.dumps(described, indent=1, allow_nan=False).encode() + b"\n")
    try:
        plot(found, args.max_ppl, args.out / "threshold.png")
    except ImportError:
        print("no curve: install matplotlib for threshold.png")
    from prosparse.sparsify import hf_model

    set_thresholds(trunk, found.pick.thresholds)
    model = hf_model.to_model(trunk, original, args.type.upper())
    # a layer whose threshold is far below the others' is folded by a great factor
    if not all(np.isfinite(tensor.dequantize()).all() for tensor in model.tensors.values()):
        raise ValueError(f"{args.type} cannot hold the folded weights: write --type bf16")
    write_folder(folder, model, args.type.upper())
    pick = found.pick
    print(
        f"{folder}: {pick.method} {pick.parameter:g}, sparsity {found.given.sparsity:.1%} -> "
        f"{pick.sparsity:.1%} at {pick.ratio:.4f} times the perplexity"
    )
    if pick is found.given:
        print(f"no threshold stays within {args.max_ppl:g}: the model is written as it was given")
    return {
        "model": str(folder),
        "hidden_act": model.config.activation.name,
        "hidden_act_param": model.config.activation.param,
        "given": asdict(found.given),
        "pick": asdict(pick),
    }


def _show(point: Point) -> None:
    print(
        f"{point.method:<10}{point.parameter:>9.4g}{point.sparsity:>10.2%}{point.ppl:>12.4f}{point.ratio:>9.4f}",
        flush=True,
    )


def methods(given: Sequence[str] | None) -> list[str]:
    """Names out of `--method`, all without it. ValueError for an unknown one."""
    if not given:
        return list(METHODS)
    names = list(dict.fromkeys(name for text in given for name in text.split(",")))
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}: known are {', '.join(METHODS)}")
    return names


def searchable(activation: Activation) -> Activation:
    """The model's activation as FATReLU, ReLU being that of threshold 0. ValueError for others."""
    if activation.name == "relu":
        return Activation("fatrelu", 0.0)
    if activation.name != "fatrelu" or activation.param < 0:
        raise ValueError(
            f"the model's activation is {activation.name} {activation.param:g}: thresholds are raised for "
            "relu and fatrelu from 0 up; make the model sparse first (prosparse sparsify)"
        )
    return activation


def parts(batches: Sequence[Batch]) -> tuple[Batch, Batch]:
    """(calibration, evaluation): no token is fed in both. ValueError for a source of one sequence."""
    first, others = [], []
    for batch in batches:
        count = len(batch.tokens)
        if count < 2:
            raise ValueError("a source fills one sequence, two are needed: raise --tokens or lower --context")
        a, b = measure.split(batch, max(1, count // _CALIBRATION))
        first.append(a)
        others.append(b)
    return measure.join(first), measure.join(others)


def search(
    trunk: "Trunk",
    calibration: Batch,
    evaluation: Batch,
    values: Mapping[str, Sequence[float] | None],
    *,
    max_ppl: float = 1.01,
    refine: int = 0,
    micro: int = 8,
    bfloat16: bool = False,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Search:
    """Measures every value of every method in `values` (None: default values), and `refine` more between the
    last within `max_ppl` and the first beyond. The thresholds of `trunk` are put back.

    A pick is the best of points on the same text, so its ratio errs to the low side by about their noise.
    """
    if not 1 <= max_ppl < math.inf:
        raise ValueError(f"--max-ppl is a factor of 1 or more, not {max_ppl}")
    if refine < 0:
        raise ValueError(f"--refine must not be negative, not {refine}")
    own = [float(mlp.threshold) for mlp in trunk.mlps]
    wanted = {name: _checked(name, given, max(own)) for name, given in values.items()}
    known = measure.Calibration(trunk, calibration, micro=micro, bfloat16=bfloat16)
    ways: dict[str, Callable[[float], Sequence[float] | np.ndarray]] = {
        "grid": lambda value: np.maximum(own, value),
        "quantile": known.quantile,
        "cett": known.cett,
    }
    if "grid" in wanted and not values["grid"]:
        wanted["grid"] += [max(own) + known.scale() * factor for factor in _SCALES]
        wanted["grid"] = sorted(value for value in set(wanted["grid"]) if value > max(own))
    given = _point(trunk, evaluation, "given", max(own), own, None, micro, bfloat16)
    on_point(given)
    points: list[Point] = []

    def add(name: str, value: float) -> None:
        try:
            thresholds = ways[name](value)
            points.append(_point(trunk, evaluation, name, value, thresholds, given.loss, micro, bfloat16))
        finally:
            set_thresholds(trunk, own)
        on_point(points[-1])

    for name, list_of in wanted.items():
        for value in list_of:
            add(name, value)
        for _ in range(refine):
            mine = [point for point in points if point.method == name]
            start = max(own) if name == "grid" else 0.0
            low = max([start, *(p.parameter for p in mine if p.ratio <= max_ppl)])
            high = min((p.parameter for p in mine if p.parameter > low), default=None)
            if high is None:
                break
            add(name, (low + high) / 2)
    allowed = [point for point in (given, *points) if point.ratio <= max_ppl]
    pick = max(allowed, key=lambda point: (point.sparsity, -point.loss))
    return Search(given, tuple(points), pick)


def _checked(name: str, given: Sequence[float] | None, own: float) -> list[float]:
    """The values to measure, ascending; of thresholds those above the model's `own`. None: by default."""
    if name != "grid":
        values = sorted(set(given or (_QUANTILES if name == "quantile" else _CETTS)))
        if not all(0 < value < 1 for value in values):
            raise ValueError(f"--{name} takes shares between 0 and 1, not {', '.join(map(str, values))}")
        return values
    values = sorted(set(given or PAPER))
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(f"--grid takes thresholds of 0 and more, not {', '.join(map(str, values))}")
    above = [value for value in values if value > own]
    if given and not above:
        raise ValueError(f"the model's threshold is {own:g} already: give --grid greater ones")
    return above


def _point(
    trunk: "Trunk",
    batch: Batch,
    method: str,
    parameter: float,
    thresholds: Sequence[float] | np.ndarray,
    given: float | None,
    micro: int,
    bfloat16: bool,
) -> Point:
    set_thresholds(trunk, thresholds)
    measured = measure.measure(trunk, batch, micro=micro, bfloat16=bfloat16)
    return Point(
        method,
        float(parameter),
        tuple(float(mlp.threshold) for mlp in trunk.mlps),
        measured.loss,
        math.exp(measured.loss),
        1.0 if given is None else math.exp(measured.loss - given),
        float(measured.sparsity.mean()),
        tuple(measured.sparsity.tolist()),
    )


def set_thresholds(trunk: "Trunk", thresholds: Sequence[float] | np.ndarray) -> None:
    """One a layer, float32."""
    for mlp, value in zip(trunk.mlps, thresholds, strict=True):
        mlp.threshold.fill_(float(value))


def plot(found: Search, max_ppl: float, target: Path) -> None:
    """Perplexity against sparsity, a line a method, the pick marked, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from prosparse.formats.files import written_whole

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, text in METHODS.items():
        line = [found.given, *(p for p in found.points if p.method == name)]
        line.sort(key=lambda point: point.sparsity)
        if len(line) > 1:
            xs, ys = [100 * p.sparsity for p in line], [p.ppl for p in line]
            axes.plot(xs, ys, "o-", label=f"{name}: {text}", markersize=3, linewidth=0.9)
    limit = max_ppl * found.given.ppl
    axes.axhline(limit, color="tab:gray", linestyle=":", label=f"{max_ppl:g} times given")
    axes.plot(100 * found.given.sparsity, found.given.ppl, "ks", label="given")
    axes.plot(100 * found.pick.sparsity, found.pick.ppl, "r*", markersize=12, label="pick")
    # far beyond the limit the curves say nothing, and would press the rest flat
    everything = (found.given, *found.points)
    low = min(point.ppl for point in everything)
    span = max(6 * (limit - found.given.ppl), 0.02 * found.given.ppl)
    shown = [point for point in everything if point.ppl <= low + span]
    right = max(100 * point.sparsity for point in shown)
    width = max(right - 100 * found.given.sparsity, 0.1)
    axes.set(xlim=(100 * found.given.sparsity - width / 12, right + width / 6))
    axes.set(ylim=(low - span / 12, min(max(p.ppl for p in everything), low + span) + span / 12))
    axes.set(xlabel="sparsity, %", ylabel="perplexity")
    axes.legend(fontsize=8)
    figure.tight_layout()
    with written_whole(target) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
