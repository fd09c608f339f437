"""Settings of a run that need no training to be wrong."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from prosparse.model.config import ModelConfig
from prosparse.sparsify import settings, speed
from prosparse.sparsify.presets import PRESETS, by_name


def test_other_settings_are_named(tmp_path):
    path = tmp_path / "training.json"
    described = {"seed": 1, "device": "a", "config": {"steps": 5, "betas": (0.9, 0.95), "compile": False}}
    settings.check_same(path, described)
    path.write_text(json.dumps(described))
    settings.check_same(path, described)
    free = {**described, "device": "b", "config": {**described["config"], "compile": True}}
    settings.check_same(path, free)
    for other, name in [({"seed": 2}, "seed"), ({"config": {**described["config"], "steps": 6}}, "steps")]:
        with pytest.raises(ValueError, match=f"another {name}"):
            settings.check_same(path, described | other)


def test_disk_space():
    settings.check_space(free=3 * 12 * 10 + 40, trained=10, parameters=10)
    with pytest.raises(ValueError, match="choose another --out"):
        settings.check_space(free=3 * 12 * 10 + 39, trained=10, parameters=10)


def test_the_chart_of_lambda_rises_and_ends():
    schedule = PRESETS["prosparse-llama2-7b"].schedule
    lines = settings.lambda_chart(schedule.at, schedule.total_steps, width=33, height=4).splitlines()
    assert len(lines) == 6
    filled = [sum(line[10 + i : 11 + i].strip() != "" for line in lines[:4]) for i in range(33)]
    assert filled == sorted(filled)
    assert (filled[0], filled[-1]) == (0, 4)
    assert settings.lambda_chart(lambda step: 0.0, 10).count("█") == 0


def test_an_ablation_reads_what_its_preset_reads():
    base, ablation = by_name("minicpm-s-1b"), by_name("minicpm-s-1b/relu-only")
    assert ablation.phases == base.phases
    assert ablation.tokens_until(101_000) == pytest.approx(473.02e9, rel=1e-4)


def test_readings_of_phases():
    args = SimpleNamespace(
        data=["a", "b:2"],
        decay_data=[],
        sft_data=["c"],
        self_data=None,
        self_prompts=0.0,
        batch_tokens=None,
        context=4096,
    )
    stable, decay, sft = settings.readings(args, PRESETS["minicpm-s-1b"])
    assert [s.path for s in stable.sources] == ["a", "b"]
    assert [s.path for s in decay.sources] == ["a", "b", "c"]
    assert [s.path for s in sft.sources] == ["c"]
    assert (stable.sequences, sft.sequences, stable.until, sft.until) == (1200, 247, 35_000, 101_000)
    args.decay_data = ["d"]
    assert [s.path for s in settings.readings(args, PRESETS["minicpm-s-1b"])[1].sources] == ["d"]


def test_flops_by_hand():
    config = ModelConfig(
        "llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
    )
    weights = 3 * (64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 160) + 1000 * 64
    # scores and values, each 2 * 64 * (position + 1) operations
    attention = 3 * np.mean([2 * 2 * 64 * (i + 1) for i in range(256)])
    forward = 2 * weights + attention
    assert speed.training_flops(config, 256, distil=False) == pytest.approx(3 * forward, rel=0.01)
    assert speed.training_flops(config, 256, distil=True) == pytest.approx(4 * forward, rel=0.01)
    assert speed.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert speed.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert speed.peak_flops("abacus") is None
