"""Ranks by layer within a budget of bytes: more where another rank saves more candidates."""

from collections.abc import Sequence

from prosparse.model.model import BLOCKS, Model
from prosparse.predictor.networks import gate_bytes, rank_bytes

_LADDER = (0.5, 1.0, 1.5, 2.0)  # of the uniform rank


def uniform(model: Model, budget: float, kind: str) -> int:
    """The greatest rank, in whole blocks of `kind`, at which all networks together take at most `budget` of
    the bytes of all gate matrices. ValueError if that is none."""
    block = _step(kind)
    per_rank = rank_bytes(model, kind) * model.config.num_hidden_layers
    total = sum(gate_bytes(model))
    rank = int(budget * total / per_rank + 1e-9) // block * block
    if rank < block:
        least = block * per_rank / total
        raise ValueError(
            f"a budget of {budget:g} holds no network of rank {block}: at least {least:.3f} is needed"
        )
    return rank


def ladder(rank: int, kind: str) -> list[int]:
    """Ranks to try around a uniform one, ascending, in whole blocks."""
    block = _step(kind)
    return sorted({max(block, round(rank * share / block) * block) for share in _LADDER})


def allocate(sparsities: Sequence[Sequence[float]], ranks: Sequence[int], uniform: int) -> list[int]:
    """The rank of each layer, of `ranks` (ascending), with a sum of at most `uniform` a layer.

    `sparsities[layer][i]`: what `ranks[i]` predicts. Every layer starts with the least rank; the step that
    gains most for its size is taken until none fits. Uniform ranks where that predicts no less.
    """
    layers = len(sparsities)
    chosen = [0] * layers
    left = layers * (uniform - ranks[0])
    while True:
        # jumps over several steps too: a curve may be flat first and steep then
        steps = [
            ((row[up] - row[at]) / (ranks[up] - ranks[at]), -layer, up)
            for layer, (row, at) in enumerate(zip(sparsities, chosen, strict=True))
            for up in range(at + 1, len(ranks))
            if ranks[up] - ranks[at] <= left and row[up] > row[at]
        ]
        if not steps:
            break
        _, layer, up = max(steps)
        left -= ranks[up] - ranks[chosen[-layer]]
        chosen[-layer] = up
    if uniform in ranks:
        even = ranks.index(uniform)
        greedy = sum(row[at] for row, at in zip(sparsities, chosen, strict=True))
        if greedy <= sum(row[even] for row in sparsities):
            return [uniform] * layers
    return [ranks[at] for at in chosen]


def _step(kind: str) -> int:
    """Ranks are whole blocks, and at least 8 for types without blocks."""
    return max(BLOCKS[kind][0], 8)
