"""Codes for a trained change, each as fine as what it is worth: an adapter of a given size without training.

A rounding error E of a matrix costs about half of sum_r g_r (E H E^T)_rr nats a token, where H is the mean of
x x^T over its inputs x, and g_r the mean square of the loss's derivative by its r-th output. (That is
Kronecker-factored curvature, Martens and Grosse 2015, arXiv 1503.05671, with a diagonal second factor.)
Columns are rounded one after another, and those still to come make up for what is lost, as far as they can
(Frantar et al. 2023, arXiv 2210.17323). An error that is then left in column c counts 1 / U_cc^2, with U the
upper Cholesky factor of H^-1. Where codes are entropy-coded, least is lost with steps that are all of one
size in the matrix times sqrt(g_r) / U_cc: what is worth little stays as it was, and takes hardly any bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prosparse.formats.adapter import entries_size
from prosparse.model.adapter import Adapter, check_related, fingerprint, kind_of
from prosparse.model.coded import Coded, encoded, float16
from prosparse.model.fold import folding
from prosparse.model.model import Model, float32
from prosparse.sparsify.batches import Batch

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk

_DAMPING = 0.01  # of the mean: what a sample of tokens cannot tell
_BLOCK = 128  # columns whose errors are passed on together
_SAMPLE = 8  # every so many-th row tells the first guess of a step
_TRIES, _CLOSE = 8, 0.01  # to meet a size, and how near below it is near enough
_SMALLEST, _LARGEST = 2.0**-14, 65504.0  # of float16, with all its bits


@dataclass(frozen=True, slots=True)
class Worth:
    """By the name of a matrix: H [columns, columns] of its inputs, and g [rows] of its outputs."""

    inputs: Mapping[str, Tensor]  # one of those with the same
    outputs: Mapping[str, Tensor]

    def curvature(self, name: str) -> "Curvature":
        return Curvature.of(self.inputs[_same_input(name)], self.outputs[name])


def _same_input(name: str) -> str:
    """The matrix that stands for all that have its input: q for q, k and v; gate for gate and up."""
    for others, one in ((("k_proj", "v_proj"), "q_proj"), (("up_proj",), "gate_proj")):
        for other in others:
            name = name.replace(f".{other}.", f".{one}.")
    return name


def worth(
    trunk: "Trunk",
    batches: Sequence[Batch],
    *,
    micro: int = 2,
    bfloat16: bool = False,
    seed: int = 0,
) -> Worth:
    """Over all tokens of `batches`, `micro` sequences at a time; the loss is that of tokens drawn from the
    model itself (Fisher). None of the trunk's matrices trains afterwards."""
    layers = {
        f"{name}.weight": module
        for name, module in trunk.model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def before(name: str, given: Tensor) -> None:
        x = given.detach().flatten(0, 1).float()
        with torch.autocast(x.device.type, enabled=False):
            inputs[name] = inputs.get(name, 0) + x.T @ x

    def after(name: str, gradient: Tensor) -> None:
        outputs[name] = outputs.get(name, 0) + gradient.detach().flatten(0, 1).float().square().sum(0)

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: before(name, given[0]))
        for name, layer in layers.items()
        if name == _same_input(name)
    ]
    hooks += [
        layer.register_full_backward_hook(lambda _, __, given, name=name: after(name, given[0]))
        for name, layer in layers.items()
    ]
    generator = torch.Generator(trunk.head.device).manual_seed(seed)
    tokens = [
        torch.from_numpy(batch.tokens[i : i + micro, :-1])
        for batch in batches
        for i in range(0, len(batch.tokens), micro)
    ]
    trunk.eval().requires_grad_(False)
    trunk.embedding.requires_grad_(True)  # so that there is something to go back to
    try:
        for part in tokens:
            with torch.autocast(trunk.head.device.type, torch.bfloat16, enabled=bfloat16):
                hidden = trunk(part.to(trunk.head.device))
                logits = torch.nn.functional.linear(hidden, trunk.head.detach()).float().flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            (-logits.log_softmax(-1).gather(-1, drawn).sum()).backward()
            trunk.embedding.grad = None
    finally:
        for hook in hooks:
            hook.remove()
    count = sum(part.numel() for part in tokens)
    return Worth(
        {name: total / count for name, total in inputs.items()},
        {name: total / count for name, total in outputs.items()},
    )


@dataclass(frozen=True, slots=True)
class Rounded:
    """Of one matrix: whole numbers [rows, columns], and float16 numbers, as float32, of rows and columns."""

    codes: Tensor
    steps: Tensor
    column_steps: Tensor
    cost: float  # nats a token, to second order

    def change(self) -> Tensor:
        return self.codes * self.steps[:, None] * self.column_steps


@dataclass(frozen=True, slots=True)
class Curvature:
    """What `Worth` says of one matrix, ready for `rounded`."""

    order: Tensor  # of columns: those that are worth most come first
    upper: Tensor  # U of the columns in this order
    steps: Tensor  # of rows, for errors of 1
    column_steps: Tensor  # in the matrix's own order; their geometric mean is 1

    @classmethod
    def of(cls, h: Tensor, g: Tensor) -> "Curvature":
        h = h.double()
        h = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (_DAMPING * h.diag().mean()).clamp(
            min=1e-30
        )
        order = h.diag().argsort(descending=True)
        upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
        column_steps = torch.empty_like(upper.diag())
        column_steps[order] = upper.diag()
        mean = column_steps.log().mean().exp()
        steps = mean / (g.double() + _DAMPING * g.double().mean()).clamp(min=1e-30).sqrt()
        return cls(order, upper.float(), steps.float(), (column_steps / mean).float())

    def scaled(self, scale: float) -> "Curvature":
        """For a change that is multiplied by `scale` behind it."""
        return replace(self, steps=self.steps / scale)


def rounded(change: Tensor, curvature: Curvature, step: float) -> Rounded:
    """float32 [rows, columns] in codes; `step` 1 would be an error worth half a nat in every weight."""
    order, upper = curvature.order, curvature.upper
    steps = (curvature.steps * step).half().float()
    column_steps = curvature.column_steps.clamp(_SMALLEST, _LARGEST).half().float()
    steps = steps.clamp(_SMALLEST, _LARGEST)
    left, ordered = change[:, order].clone(), column_steps[order]
    codes, cost = torch.empty_like(left), torch.zeros((), device=change.device)
    for start in range(0, left.shape[1], _BLOCK):
        end = min(start + _BLOCK, left.shape[1])
        here, block = left[:, start:end], upper[start:end, start:end]
        errors = torch.empty_like(here)
        for i in range(end - start):
            size = steps * ordered[start + i]
            code = (here[:, i] / size).round().clamp(-32767, 32767)
            error = here[:, i] - code * size
            codes[:, start + i], errors[:, i] = code, error / block[i, i]
            cost += (error / curvature.column_steps[order[start + i]] / curvature.steps).square().sum()
            here[:, i + 1 :] -= errors[:, i, None] * block[i, i + 1 :]
        left[:, end:] -= errors @ upper[start:end, end:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return Rounded(result, steps, column_steps, 0.5 * float(cost))


def adapter(
    base: Model,
    tuned: Model,
    of: Worth,
    size: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Adapter:
    """The adapter of at most `size` bytes that takes `base` nearest to `tuned`, by what errors are worth.

    Embedding and head of `tuned` are left out. ValueError if it is of another kind, or `size` is too small.
    """
    check_related(base, tuned)
    homogeneous = tuned.config.activation.name in ("relu", "fatrelu")  # gates may have been folded
    factors = dict(enumerate(folding(tuned, base) if homogeneous else [1.0] * base.config.num_hidden_layers))
    vectors = {
        name: float32(tensor.dequantize()) for name, tensor in tuned.tensors.items() if len(tensor.shape) == 1
    }
    parts = {name: _Part.of(base, tuned, name, factors, of) for name in tuned.tensors if name in of.outputs}
    fixed = sum(vector.nbytes for vector in vectors.values()) + sum(part.fixed for part in parts.values())
    budget = size - fixed - entries_size(len(vectors), len(parts))
    if budget < sum(part.change.numel() for part in parts.values()) / 64:
        raise ValueError(f"an adapter of {size / 1e6:.3g} MB is too small for {tuned.name}: give it more")
    step = _first_step(parts, budget)
    best: tuple[int, dict[str, Coded]] | None = None
    tried: list[tuple[float, int]] = []
    for _ in range(_TRIES):
        results = {name: part.coded(step) for name, part in parts.items()}
        coded = {name: change for name, (change, _) in results.items()}
        found = sum(change.stream.nbytes for change in coded.values())
        cost = sum(cost for _, cost in results.values())
        progress(f"{(size - budget + found) / 1e6:.2f} MB: errors cost {cost:.3f} nats, to second order")
        tried.append((math.log2(step), found))
        if found <= budget and (best is None or found > best[0]):
            best = found, coded
        if budget * (1 - _CLOSE) <= found <= budget:
            break
        step = 2.0 ** _next(tried, budget * (1 - _CLOSE / 2), parts)
    if best is None:
        raise ValueError(f"an adapter of {size / 1e6:.3g} MB is too small for {tuned.name}: give it more")
    return Adapter(fingerprint(base.tensors), tuned.config.activation, best[1], vectors, tuned.name)


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix: the change of `scale` times the base's, and what it is worth."""

    scale: float
    change: Tensor
    curvature: Curvature

    @classmethod
    def of(cls, base: Model, tuned: Model, name: str, factors: Mapping[int, float], found: Worth) -> "_Part":
        ours, theirs = (torch.from_numpy(m.tensors[name].dequantize()) for m in (tuned, base))
        if not ours.isfinite().all():
            raise ValueError(f"tensor {name} of {tuned.name}: NaN or infinite values")
        factor = factors[int(name.split(".")[2])]
        scale = {"gate_proj": factor, "up_proj": 1 / factor}.get(kind_of(name), 1.0)
        curvature = found.curvature(name)
        # derivatives are by outputs of the tuned matrix, and codes are inside the scale
        return cls(scale, (ours / scale - theirs).to(curvature.steps.device), curvature.scaled(scale))

    @property
    def fixed(self) -> int:
        """Bytes of steps."""
        return 2 * sum(self.change.shape)

    def coded(self, step: float) -> tuple[Coded, float]:
        """Its codes, and what their errors cost."""
        found = rounded(self.change, self.curvature, step)
        steps, column_steps = (float16(t.cpu().numpy()) for t in (found.steps, found.column_steps))
        stream = encoded(found.codes.cpu().numpy())
        return Coded(self.scale, self.change.shape[1], steps, column_steps, stream), found.cost

    def guessed_bytes(self, step: float) -> int:
        """Of some rows, each weight rounded by itself."""
        rows = slice(None, None, _SAMPLE)
        sizes = (self.curvature.steps[rows, None] * step) * self.curvature.column_steps
        codes = (self.change[rows] / sizes).round().clamp(-32767, 32767)
        return encoded(codes.cpu().numpy()).nbytes * _SAMPLE


def _first_step(parts: Mapping[str, _Part], budget: int) -> float:
    low, high = -40.0, 10.0  # of its logarithm
    for _ in range(12):
        middle = (low + high) / 2
        if sum(part.guessed_bytes(2.0**middle) for part in parts.values()) > budget:
            low = middle
        else:
            high = middle
    return 2.0**high


def _next(tried: Sequence[tuple[float, int]], wanted: float, parts: Mapping[str, _Part]) -> float:
    """The logarithm of the step to try: along the line through the last two, or as bits of a code fall."""
    last, found = tried[-1]
    slope = -sum(part.change.numel() for part in parts.values()) / 10
    if len(tried) > 1 and (before := tried[-2])[0] != last and found != before[1]:
        slope = min((found - before[1]) / (last - before[0]), slope / 8)
    return last + max(-2.0, min(2.0, (wanted - found) / slope))
