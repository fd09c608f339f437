"""Loss, sparsity and gates of a model on the first tokens of each source: what `threshold` and `stats` share.

Nothing here imports torch before it is called, so that the verbs' help stays instant.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prosparse.sparsify.batches import Batch
from prosparse.sparsify.tokens import Encoder, encoded_rows

if TYPE_CHECKING:
    from torch import Tensor

    from prosparse.model.activation import Activation
    from prosparse.model.model import Model
    from prosparse.sparsify.hf_model import Trunk

_CHUNK = 1024  # tokens whose logits exist at a time: 0.2 GB with a vocabulary of 50,000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`-m --data --tokens --context --out --micro --device --json`."""
    add = parser.add_argument
    add(
        "-m",
        "--model",
        metavar="M",
        required=True,
        help="GGUF file, HF folder, Hub id (org/name), demo or demo-original",
    )
    add(
        "--data",
        action="append",
        required=True,
        metavar="D",
        help="file, folder, hf:NAME or store of a run, read from its start; may be repeated",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--tokens", type=int, default=65536, metavar="N", help="tokens of each source [65536]")
    add("--context", type=int, default=1024, metavar="N", help="tokens a sequence [1024]")
    add("--micro", type=int, default=8, metavar="N", help="sequences at a time; lower it to save memory [8]")
    add("--device", help="torch device [cuda if there is one]")
    add("--json", action="store_true", help="end with one JSON object on the last line")


def samples(args: argparse.Namespace, original: "Model") -> list[Batch]:
    """One for each of `--data`, cut by the model's own tokenizer. ValueError for what cannot be measured."""
    config = original.config
    if args.micro < 1:
        raise ValueError(f"--micro must be at least 1, not {args.micro}")
    if args.context > config.max_position_embeddings:
        raise ValueError(
            f"the model was made for {config.max_position_embeddings} tokens: lower --context {args.context}"
        )
    if len(set(args.data)) != len(args.data):
        raise ValueError("a source of --data is there twice: give each once")
    encoder = Encoder(original.tokenizer, config.bos_token_id, config.eos_token_ids)
    return [sample(source, encoder, args.tokens, args.context) for source in args.data]


def sample(source: str, encoder: Encoder, tokens: int, context: int) -> Batch:
    """The first `tokens` tokens of a source as whole sequences of `context`, each with the token after it.

    Rows are encoded only as far as they are needed. As in training, sequences overlap by one token: it is
    the last target of one and the first input of the next. ValueError for less than one sequence.
    """
    if context < 1 or tokens < context:
        raise ValueError(f"{tokens} tokens do not fill a sequence of {context}: raise --tokens")
    wanted = tokens // context * context + 1
    ids, loss, document = [], [], []
    count = 0
    for number, (row_ids, row_loss) in enumerate(encoded_rows(source, encoder)):
        ids.append(row_ids)
        loss.append(row_loss)
        document.append(np.full(len(row_ids), number, np.int32))
        count += len(row_ids)
        if count >= wanted:
            break
    sequences = (min(count, wanted) - 1) // context
    if sequences < 1:
        raise ValueError(
            f"{source} has {count} tokens, one sequence needs {context + 1}: give more or lower --context"
        )
    place = np.arange(sequences)[:, None] * context + np.arange(context + 1)
    documents = np.concatenate(document)[place]
    return Batch(
        np.concatenate(ids)[place].astype(np.int64),
        np.concatenate(loss)[place] != 0,
        documents - documents[:, :1],
    )


def join(batches: Sequence[Batch]) -> Batch:
    """All sequences of batches of one context."""
    parts = [(batch.tokens, batch.loss, batch.document) for batch in batches]
    return Batch(*map(np.concatenate, zip(*parts, strict=True)))


def split(batch: Batch, first: int) -> tuple[Batch, Batch]:
    """The `first` sequences, and the others."""
    arrays = batch.tokens, batch.loss, batch.document
    return Batch(*(a[:first] for a in arrays)), Batch(*(a[first:] for a in arrays))


def load(
    original: "Model", device: str | None = None, activation: "Activation | None" = None
) -> tuple["Trunk", bool]:
    """The model on `device` (None: the GPU if there is one), with another activation if one is given; and
    whether its products are to be in bfloat16, as on a GPU they are. ValueError without torch."""
    try:
        import torch

        from prosparse.sparsify import hf_model
    except ImportError:
        raise ValueError("this needs torch: install the build for your machine from pytorch.org") from None
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if activation is not None:
        original = replace(original, config=replace(original.config, activation=activation))
    return hf_model.load(original, device=place), place.type == "cuda"


@dataclass(frozen=True, slots=True)
class Measured:
    """`loss`: mean nats of the next token over the `tokens` that are learnt; `sparsity`: float64 [layers],
    the share of zeros in x1 over all tokens that were fed."""

    loss: float
    tokens: int
    sparsity: np.ndarray


def measure(
    trunk: "Trunk",
    batch: Batch,
    *,
    micro: int = 8,
    bfloat16: bool = False,
    observe: "Callable[[int, Tensor], None] | None" = None,
) -> Measured:
    """Runs `batch`, `micro` sequences at a time. `observe(layer, x1 [micro, context, d_ff])` sees every x1.

    ValueError for tokens the model does not know, nothing to learn, or any number that is not finite. The
    model is left as it was, its mode and the `observe` of its MLPs too.
    """
    from prosparse.sparsify.distributed import full
    from prosparse.sparsify.regularizer import SparsityCounter

    learnt = int(batch.loss[:, 1:].sum())
    if not learnt:
        raise ValueError("the sample has no token to learn: it is prompts only; raise --tokens")
    # FATReLU makes a gate that is NaN a zero, so the loss would not show it
    for layer, mlp in enumerate(trunk.mlps):
        if not full(mlp.gate_proj.weight.isfinite().all()):
            raise ValueError(f"layer {layer} has gate weights that are not finite: the model is broken")
    counter = SparsityCounter(len(trunk.mlps), trunk.head.device)

    def see(layer: int, x1: "Tensor") -> None:
        counter.add(layer, x1)
        if observe is not None:
            observe(layer, x1)

    total = 0.0
    with _measuring(trunk, see):
        for hidden, targets, learn in _run(trunk, batch, micro, bfloat16):
            total += _loss(trunk, hidden, targets, learn, bfloat16)
    return Measured(total / learnt, learnt, counter.per_layer().cpu().numpy())


@contextmanager
def _measuring(trunk: "Trunk", observe: "Callable[[int, Tensor], None] | None") -> Iterator[None]:
    """Evaluation mode, no gradients, x1 observed; what was there before comes back."""
    import torch

    modes = [(module, module.training) for module in trunk.model.modules()]
    observers = [mlp.observe for mlp in trunk.mlps]
    try:
        trunk.model.eval()
        for layer, mlp in enumerate(trunk.mlps):
            mlp.observe = partial(observe, layer) if observe is not None else None
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for mlp, before in zip(trunk.mlps, observers, strict=True):
            mlp.observe = before


def _run(
    trunk: "Trunk", batch: Batch, micro: int, bfloat16: bool
) -> Iterator[tuple["Tensor", "Tensor", "Tensor"]]:
    """(hidden [n, d], targets [n], learn [n]) of `micro` sequences at a time."""
    import torch

    device = trunk.head.device
    if (top := int(batch.tokens.max())) >= trunk.head.shape[0]:
        raise ValueError(f"the sample holds token {top}, the model knows {trunk.head.shape[0]}")
    for start in range(0, len(batch.tokens), micro):
        tokens = torch.from_numpy(batch.tokens[start : start + micro]).to(device)
        learn = torch.from_numpy(batch.loss[start : start + micro, 1:]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            hidden = trunk(tokens[:, :-1])
        yield hidden.flatten(0, 1), tokens[:, 1:].flatten(), learn.flatten()


def _loss(trunk: "Trunk", hidden: "Tensor", targets: "Tensor", learn: "Tensor", bfloat16: bool) -> float:
    """Sum of the learnt tokens' losses, nats."""
    import torch
    import torch.nn.functional as F

    total = 0.0
    for start in range(0, len(hidden), _CHUNK):
        part = slice(start, start + _CHUNK)
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bfloat16):
            logits = hidden[part] @ trunk.head.T
        losses = F.cross_entropy(logits.float(), targets[part], reduction="none")
        # of the others too: a number that is not finite is wrong wherever it stands
        if not losses.isfinite().all():
            raise ValueError("the loss is not finite: the weights are broken, or overflow in this precision")
        total += float(losses[learn[part]].double().sum())
    return total


class Calibration:
    """The inputs of every FFN on some text, and the thresholds of each layer that follow from them.

    At most `most` tokens are kept, evenly spaced. Thresholds are float64 [layers] and never below those
    that the model has; a layer in which no gate is open keeps its own.
    """

    def __init__(
        self, trunk: "Trunk", batch: Batch, *, micro: int = 8, bfloat16: bool = False, most: int = 2048
    ) -> None:
        import torch

        self._trunk, self._bfloat16 = trunk, bfloat16
        kept: list[list[Tensor]] = [[] for _ in trunk.mlps]
        stride = max(1, -(-(batch.tokens.size - len(batch.tokens)) // most))
        seen = 0  # tokens; the last layer counts them

        def keep(layer: int, _: object, inputs: tuple["Tensor", ...]) -> None:
            nonlocal seen
            x = inputs[0].flatten(0, -2)
            kept[layer].append(x[-seen % stride :: stride].cpu())
            if layer == len(kept) - 1:
                seen += len(x)

        hooks = [mlp.register_forward_pre_hook(partial(keep, layer)) for layer, mlp in enumerate(trunk.mlps)]
        try:
            with _measuring(trunk, None):
                for hidden, _, _ in _run(trunk, batch, micro, bfloat16):
                    if not hidden.isfinite().all():
                        raise ValueError("hidden states are not finite: the weights are broken")
        finally:
            for hook in hooks:
                hook.remove()
        self.inputs = [torch.cat(parts) for parts in kept]  # by layer, [n, d], on the CPU

    def scale(self) -> float:
        """Mean over layers of the median by which open gates exceed the threshold; 0 if none is open."""
        over = self.quantile(0.5) - [float(mlp.threshold) for mlp in self._trunk.mlps]
        return float(over.mean())

    def quantile(self, share: float) -> np.ndarray:
        """The thresholds that close this share of each layer's open gates (positive, and not below the
        threshold): the quantile of their pre-activations, with linear interpolation."""
        _check_share("a quantile", share)
        return np.array([self._quantile(layer, share) for layer in range(len(self.inputs))])

    def cett(self, limit: float) -> np.ndarray:
        """The greatest thresholds that drop at most `limit` of each layer's FFN output: the cumulative
        errors of tail truncation (Sparsing Law, arXiv 2411.02335), |output of what is dropped| / |output|,
        mean over tokens. By bisection over the open gates, so exact where the error rises with the
        threshold."""
        _check_share("CETT", limit)
        return np.array([self._cett(layer, limit) for layer in range(len(self.inputs))])

    def _quantile(self, layer: int, share: float) -> float:
        gate, _ = self._gate_and_x1(layer)
        values = self._open(layer, gate)
        if not len(values):
            return float(self._trunk.mlps[layer].threshold)
        place = share * (len(values) - 1)
        below = math.floor(place)
        low, high = float(values[below]), float(values[min(below + 1, len(values) - 1)])
        return low + (high - low) * (place - below)

    def _cett(self, layer: int, limit: float) -> float:
        import torch
        import torch.nn.functional as F

        mlp = self._trunk.mlps[layer]
        gate, x1 = self._gate_and_x1(layer)
        values = self._open(layer, gate)

        def norms(part: "Tensor") -> "Tensor":
            with torch.autocast(part.device.type, torch.bfloat16, enabled=self._bfloat16):
                return F.linear(part, mlp.down_proj.weight).float().norm(dim=-1)

        with torch.no_grad():
            whole = norms(x1)
            live = whole > 0  # a token without output loses nothing
            if not live.any():
                return float(mlp.threshold)
            # values[low] is within the limit (the first drops nothing), values[high] is not
            low, high = 0, len(values)
            while high - low > 1:
                middle = (low + high) // 2
                dropped = norms(torch.where(gate < values[middle], x1, 0.0))
                if float((dropped[live] / whole[live]).mean(dtype=torch.float64)) <= limit:
                    low = middle
                else:
                    high = middle
        return float(values[low])

    def _gate_and_x1(self, layer: int) -> tuple["Tensor", "Tensor"]:
        """gate x as float32, and x1, both [n, d_ff]."""
        import torch

        from prosparse.sparsify.swap import activate

        mlp = self._trunk.mlps[layer]
        x = self.inputs[layer].to(self._trunk.head.device)
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=self._bfloat16):
            gate = mlp.gate_proj(x)
            return gate.float(), activate(mlp.activation, gate, mlp.threshold) * mlp.up_proj(x)

    def _open(self, layer: int, gate: "Tensor") -> "Tensor":
        """The open gates' pre-activations in ascending order."""
        return gate[(gate > 0) & (gate >= self._trunk.mlps[layer].threshold)].sort().values


def _check_share(what: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{what} must be at least 0 and below 1, not {value}")
