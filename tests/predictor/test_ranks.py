"""Budgets in bytes, and ranks by layer against every possible choice."""

from itertools import product

import numpy as np
import pytest

from prosparse.predictor import networks, ranks


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
@pytest.mark.parametrize("budget", [0.3, 0.75, 1.5, 4.0])
def test_a_uniform_rank_fills_the_budget(tiny_model, kind, budget):
    pytest.importorskip("torch")
    model = tiny_model(act="relu", type="Q8_0")
    block = 8 if kind == "F16" else 32
    allowed = budget * sum(networks.gate_bytes(model))
    assert networks.gate_bytes(model) == [160 * 96 // 32 * 34] * 2

    def bytes_of(rank):
        fc1, fc2 = np.zeros((rank, 96), np.float32), np.zeros((160, rank), np.float32)
        return 2 * (networks.stored(fc1, kind).nbytes + networks.stored(fc2, kind).nbytes)

    if bytes_of(block) > allowed:
        with pytest.raises(ValueError, match="at least"):
            ranks.uniform(model, budget, kind)
        return
    rank = ranks.uniform(model, budget, kind)
    assert rank % block == 0
    assert bytes_of(rank) <= allowed < bytes_of(rank + block)


def test_the_ladder_is_of_whole_blocks():
    assert ranks.ladder(128, "Q8_0") == [64, 128, 192, 256]
    assert ranks.ladder(32, "Q4_0") == [32, 64]
    assert ranks.ladder(16, "F16") == [8, 16, 24, 32]


@pytest.mark.parametrize("seed", range(20))
def test_ranks_are_near_the_best_there_are(seed):
    rng = np.random.default_rng(seed)
    tried, layers = [32, 64, 96, 128], 5
    table = np.sort(rng.random((layers, len(tried))), axis=1)
    got = ranks.allocate(table.tolist(), tried, 64)
    assert sum(got) <= 64 * layers
    value = sum(table[i, tried.index(rank)] for i, rank in enumerate(got))
    choices = [c for c in product(range(4), repeat=layers) if sum(tried[i] for i in c) <= 64 * layers]
    best = max(sum(table[i, at] for i, at in enumerate(c)) for c in choices)
    least = table[:, 0].sum()
    assert value >= table[:, 1].sum()
    assert value - least >= 0.75 * (best - least)


def test_where_nothing_is_gained_ranks_are_uniform():
    assert ranks.allocate([[0.5, 0.6, 0.65]] * 4, [32, 64, 96], 64) == [64] * 4
    # a layer that gains nothing gives its rank to one that does
    assert ranks.allocate([[0.9, 0.9, 0.9], [0.1, 0.3, 0.6]], [32, 64, 96], 64) == [32, 96]
