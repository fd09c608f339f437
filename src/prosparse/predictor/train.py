"""Training of one layer's network: as published, and from a better start.

Both give (fc1 [rank, d], fc2 [d_ff, rank]) without biases, as PowerInfer and the engine take them.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosparse.predictor import metrics
from prosparse.predictor.collect import unpack
from prosparse.predictor.networks import scorer

Networks = tuple[np.ndarray, np.ndarray]  # float32 (fc1, fc2)
_STATISTICS = 1 << 15  # tokens from which means and covariances are taken
_RIDGE = 1e-6  # of the mean variance: keeps the constant's direction finite where inputs are few
_OPEN = 2.5  # standard deviations by which hidden units are open at first, so that they are nearly linear
_WARMUP = 20  # steps
_LOGISTIC = 1.7  # a logistic of this slope is the normal distribution function to 0.01


@dataclass(frozen=True, slots=True)
class Training:
    """Defaults are those of the published recipe (Raincleared-Song/DejaVu_predictor)."""

    rank: int
    epochs: int = 20
    batch: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    patience: int = 5  # epochs without a gain after which it stops
    enough: float = 0.99  # it also stops above this recall (the published one only)
    decay: bool = False  # the rate rises over 20 steps and falls along a line to 0 at the last epoch
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 1 or self.batch < 1:
            raise ValueError("rank, epochs and batch must be at least 1")


@dataclass(frozen=True, slots=True)
class Examples:
    """Of one layer: `inputs` float16 [n, d], `labels` bits [n, ceil(d_ff / 8)]; and others, held out.

    `unit`: inputs are divided by their root mean square, token by token. A network without biases is
    homogeneous, so at score 0 it decides alike with and without; but raw residual streams differ by a factor
    of a thousand between tokens, and the largest would be all that is learnt.
    """

    inputs: np.ndarray
    labels: np.ndarray
    held_inputs: np.ndarray
    held_labels: np.ndarray
    d_ff: int
    unit: bool = False

    def given(self, x: Tensor) -> Tensor:
        """Inputs as they are learnt from."""
        return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12) if self.unit else x


def published_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Weighted binary cross-entropy of logits and labels 0 or 1 [n, d_ff], mean: positives weigh 1, negatives
    the share of positives + 0.005, so that recall is bought with candidates."""
    weight = labels.mean() + 0.005
    return F.binary_cross_entropy_with_logits(logits, labels, weight=labels * (1 - weight) + weight)


def train_published(
    examples: Examples,
    training: Training,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> Networks:
    """The published predictor: Linear, ReLU, Linear from torch's own start, AdamW, the checkpoint of the best
    recall at logit 0 on held-out examples. `progress(epoch, recall)`."""
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        fc1 = nn.Linear(examples.inputs.shape[1], training.rank, bias=False)
        fc2 = nn.Linear(training.rank, examples.d_ff, bias=False)
    network = nn.Sequential(fc1, nn.ReLU(), fc2).to(device)

    def judge() -> float:
        score = partial(_scores, network, examples, device)
        return metrics.count(score, examples.held_inputs, examples.held_labels, [0.0])[0].recall

    _fit(network, examples, training, device, judge, training.enough, progress)
    return _numpy(fc1.weight), _numpy(fc2.weight)


def train_lowrank(
    examples: Examples,
    gate: np.ndarray,
    threshold: float,
    recall: float,
    training: Training,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> Networks:
    """A network that starts as the best approximation of the `gate` [d_ff, d] of its rank, with the
    activation's `threshold`, and is trained on the published loss. The checkpoint of the greatest predicted
    sparsity at `recall` on held-out examples, and in it scores of about 0 where that recall is reached.
    `gate` is to act on the inputs as they are learnt from. `progress(epoch, predicted sparsity)`.
    """
    network = _Biased(_start(_components(examples, gate, device), threshold, training.rank)).to(device)
    _fit(
        network,
        examples,
        training,
        device,
        lambda: _judged(network, examples, recall, device)[0],
        math.inf,
        progress,
    )
    # a bias moves the threshold to 0, where neither the size of the input matters nor whose threshold it is
    _, at = _judged(network, examples, recall, device)
    with torch.no_grad():
        network.bias2 -= at
    return network.folded()


def untrained(
    examples: Examples,
    gate: np.ndarray,
    threshold: float,
    recall: float,
    ranks: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[float]:
    """Predicted sparsity at `recall` on held-out examples with the starts of `train_lowrank`, by rank."""
    parts = _components(examples, gate, device)
    networks = (_Biased(_start(parts, threshold, rank)).to(device) for rank in ranks)
    return [_judged(network, examples, recall, device)[0] for network in networks]


def _judged(
    network: nn.Module, examples: Examples, recall: float, device: torch.device | str
) -> tuple[float, float]:
    """Predicted sparsity on the held-out examples where they have `recall`, and the score at which."""
    score = partial(_scores, network, examples, device)
    inputs, labels = examples.held_inputs, examples.held_labels
    (at,) = metrics.calibrate(score, inputs, labels, [recall])
    return metrics.count(score, inputs, labels, [at])[0].predicted_sparsity, at


def weighted(
    networks: Networks,
    examples: Examples,
    importance: np.ndarray,
    recall: float,
    device: torch.device | str = "cpu",
) -> Networks:
    """A network of `train_lowrank` that would rather miss neurons of little `importance` [d_ff]: its scores,
    log odds, plus the log of that, so that candidates are those whose odds times importance are large. Scores
    are again about 0 where `recall` is reached."""
    fc1, fc2 = networks[0], networks[1].copy()
    fc2[:, 0] += np.log(importance)  # the first hidden unit is nearly 1 for every token
    network = scorer("lowrank", (fc1, fc2), device)

    def score(x: Tensor) -> Tensor:
        return network(examples.given(x))

    (at,) = metrics.calibrate(score, examples.held_inputs, examples.held_labels, [recall])
    fc2[:, 0] -= np.float32(at)
    return fc1, fc2


def balanced(networks: Networks) -> Networks:
    """The same function with columns of fc2 alike in size, so that 32 of them share a scale well."""
    fc1, fc2 = networks
    size = np.sqrt(np.square(fc2).mean(0))
    size = np.where(size > 0, size, 1).astype(np.float32)
    return fc1 * size[:, None], fc2 / size


@dataclass(frozen=True, slots=True)
class _Start:
    """A network with biases. `scale` [d]: inputs are divided by it; `constant` [d]: its product with those is
    nearly 1 for every token, which is how a network without biases has them."""

    scale: Tensor
    constant: Tensor
    fc1: Tensor
    bias1: Tensor
    fc2: Tensor
    bias2: Tensor


class _Biased(nn.Module):
    """fc2 relu(fc1 x + bias1 m) + bias2 m with m = constant x, which is a network of one more rank without
    biases. Trained in this form because AdamW then moves biases as easily as weights."""

    scale: Tensor
    constant: Tensor

    def __init__(self, start: _Start) -> None:
        super().__init__()
        self.register_buffer("scale", start.scale)
        self.register_buffer("constant", start.constant)
        self.fc1, self.bias1 = nn.Parameter(start.fc1), nn.Parameter(start.bias1)
        self.fc2, self.bias2 = nn.Parameter(start.fc2), nn.Parameter(start.bias2)

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.scale
        one = (x @ self.constant)[:, None]
        hidden = F.relu(torch.addmm(one * self.bias1, x, self.fc1.T))
        return torch.addmm(one * self.bias2, hidden, self.fc2.T)

    def folded(self) -> Networks:
        with torch.no_grad():
            fc1 = self.fc1 + torch.outer(self.bias1, self.constant)
            fc1 = torch.cat([self.constant[None], fc1]) / self.scale
            fc2 = torch.cat([self.bias2[:, None], self.fc2], 1)
        return _numpy(fc1), _numpy(fc2)


@dataclass(frozen=True, slots=True)
class _Components:
    """What starts of any rank are made of: float64, on the device. `w` [d_ff, d] acts on inputs divided by
    `scale`, whose `mean` it has; `outer` [d_ff, min(d, d_ff)] are its outputs' principal components times
    their standard deviations `size`; `total` [d_ff] the outputs' variances; `density` the share of labels."""

    scale: Tensor
    constant: Tensor
    mean: Tensor
    w: Tensor
    outer: Tensor
    size: Tensor
    total: Tensor
    density: float


def _components(examples: Examples, gate: np.ndarray, device: torch.device | str) -> _Components:
    stride = max(1, len(examples.inputs) // _STATISTICS)
    x = torch.from_numpy(examples.inputs[::stride].astype(np.float32)).to(device)
    x = examples.given(x).double()
    w = torch.from_numpy(gate).to(device).double()
    scale = x.square().mean(0).sqrt().clamp_min(1e-8)
    x, w = x / scale, w * scale
    if not x.isfinite().all() or not w.isfinite().all():
        raise ValueError("inputs or gate are not finite: the model is broken")
    second = x.T @ x / len(x)
    mean = x.mean(0)
    ridge = _RIDGE * second.diagonal().mean() * torch.eye(len(second)).to(second)
    constant = torch.linalg.solve(second + ridge, mean)
    covariance = second - torch.outer(mean, mean)
    # with C the covariance and R R' = C: w R has the singular values and left vectors of the outputs
    values, vectors = torch.linalg.eigh(covariance)
    spread = w @ (vectors * values.clamp_min(0).sqrt())
    values, vectors = torch.linalg.eigh(spread.T @ spread)
    k = min(spread.shape)
    size = values.flip(0)[:k].clamp_min(0).sqrt()
    size = size.clamp_min(1e-6 * float(size[0]) + 1e-12)
    outer = spread @ vectors.flip(1)[:, :k]
    density = float(unpack(np.ascontiguousarray(examples.labels[::stride]), examples.d_ff).mean())
    return _Components(scale, constant, mean, w, outer, size, spread.square().sum(1), density)


def _start(parts: _Components, threshold: float, rank: int) -> _Start:
    """The linear predictor of least squared error in the gate's pre-activations: their first principal
    components on the inputs, each neuron then scaled by the error that is left, as the probability that it
    is active asks for. Hidden units are shifted so far that their ReLU seldom bends at first."""
    w, mean = parts.w, parts.mean
    k = min(rank - 1, len(parts.size))
    outer, size = parts.outer[:, :k], parts.size[:k]
    fc1 = (outer / size).T @ w / size[:, None]  # outputs of variance 1
    error = parts.total - outer.square().sum(1)
    error = error.clamp_min(1e-4 * float(parts.total.mean()) + 1e-12).sqrt()
    slope = _LOGISTIC / error
    fc2 = outer * slope[:, None]
    # the loss counts negatives less: its best answer lies higher by so much
    bias2 = slope * (w @ mean - threshold) - _OPEN * fc2.sum(1) - math.log(parts.density + 0.005)
    bias1 = _OPEN - fc1 @ mean
    if more := rank - 1 - k:  # more than the gate has: units that begin with nothing
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(more, len(mean), generator=generator) / math.sqrt(len(mean))
        fc1 = torch.cat([fc1, random.to(fc1)])
        bias1 = torch.cat([bias1, bias1.new_zeros(more)])
        fc2 = torch.cat([fc2, fc2.new_zeros(len(fc2), more)], 1)
    start = (parts.scale, parts.constant, fc1, bias1, fc2, bias2)
    return _Start(*(part.float().contiguous() for part in start))


def _fit(
    network: nn.Module,
    examples: Examples,
    training: Training,
    device: torch.device | str,
    judge: Callable[[], float],
    enough: float,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Trains `network` and leaves it as it was when `judge` was greatest, its start included."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    rng = np.random.default_rng(training.seed)
    steps = training.epochs * -(-len(examples.inputs) // training.batch)
    step = 0
    best, state, since = judge(), copy.deepcopy(network.state_dict()), 0
    for epoch in range(1, training.epochs + 1):
        total = torch.zeros((), device=device)
        for x, y in _batches(examples, training.batch, rng, device):
            loss = published_loss(network(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if training.decay:
                share = min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)
                optimizer.param_groups[0]["lr"] = training.learning_rate * share
            optimizer.step()
            step += 1
            total += loss.detach()
        if not total.isfinite():
            raise ValueError(
                "the loss is not finite: the inputs are broken, or the learning rate is too high"
            )
        value = judge()
        if progress:
            progress(epoch, value)
        if value > best:
            best, state, since = value, copy.deepcopy(network.state_dict()), 0
        else:
            since += 1
        if best > enough or since >= training.patience:
            break
    network.load_state_dict(state)


def _batches(
    examples: Examples, size: int, rng: np.random.Generator, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(float32 [n, d], float32 [n, d_ff]) of all examples once, in random order."""
    order = rng.permutation(len(examples.inputs))
    for start in range(0, len(order), size):
        at = np.sort(order[start : start + size])  # ascending: the arrays are mapped files
        x = examples.given(torch.from_numpy(examples.inputs[at].astype(np.float32)).to(device))
        y = torch.from_numpy(unpack(examples.labels[at], examples.d_ff)).to(device)
        yield x, y.float()


def _scores(network: nn.Module, examples: Examples, device: torch.device | str, x: Tensor) -> Tensor:
    with torch.no_grad():
        scores: Tensor = network(examples.given(x.to(device)))
    return scores


def _numpy(weight: Tensor) -> np.ndarray:
    return np.ascontiguousarray(weight.detach().float().cpu().numpy())
