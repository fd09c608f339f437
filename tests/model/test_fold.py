"""Folded models compute the same as the models they came from."""

from dataclasses import replace

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.model.activation import Activation
from prosparse.model.config import ModelConfig
from prosparse.model.fold import fold_scales, fold_thresholds
from prosparse.model.model import Tensor
from prosparse.model.predictor import Predictors, scores


def minicpm(tiny_model, tied):
    return tiny_model(
        "minicpm",
        act="fatrelu",
        act_param=0.3,
        tied=tied,
        embedding_scale=12.0,
        residual_scale=1.4 / np.sqrt(2),
        logit_scale=6.0,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_minicpm_as_llama_has_the_same_logits(tiny_model, tied):
    model = minicpm(tiny_model, tied)
    folded = fold_scales(model)
    assert folded.config.architecture == "llama" and not folded.config.tie_word_embeddings
    assert folded.config.activation == model.config.activation
    tokens = np.arange(12, dtype=np.int32)
    logits = [LLM(m, backend="naive").forward(tokens, all_logits=True) for m in (model, folded)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()


def test_weights_are_scaled_as_the_method_says(tiny_model):
    model = minicpm(tiny_model, True)
    folded = fold_scales(model)

    def ratio(name, source=None):
        return folded.tensors[name].dequantize() / model.tensors[source or name].dequantize()

    embedding = "model.embed_tokens.weight"
    assert np.allclose(ratio(embedding), 12)
    assert np.allclose(ratio("lm_head.weight", embedding), 1 / 6)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        assert np.allclose(ratio(f"model.layers.1.{part}.weight"), 1.4 / np.sqrt(2))
    for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "input_layernorm"):
        name = f"model.layers.1.{part}.weight"
        assert folded.tensors[name] is model.tensors[name]


def test_only_minicpm_has_scales(tiny_model):
    model = tiny_model()
    assert fold_scales(model) is model


def test_per_layer_thresholds_become_one(tiny_model):
    model = tiny_model(act="relu")
    own = [0.1, 0.4]
    folded = fold_thresholds(model, own, 0.2)
    assert folded.config.activation == Activation("fatrelu", 0.2)
    x = np.random.default_rng(0).standard_normal((50, 96)).astype(np.float32)
    for i, threshold in enumerate(own):

        def ffn(m, act, i=i):
            gate, up = (
                m.tensors[f"model.layers.{i}.mlp.{p}_proj.weight"].dequantize() for p in ("gate", "up")
            )
            return act(x @ gate.T) * (x @ up.T)

        before, after = ffn(model, Activation("fatrelu", threshold)), ffn(folded, folded.config.activation)
        assert np.allclose(before, after, rtol=1e-5, atol=1e-6)
        assert np.array_equal(before == 0, after == 0)


@pytest.mark.parametrize("thresholds", [[0.1], [0.1, 0.0], [0.1, -1], [0.1, float("nan")]])
def test_thresholds_that_cannot_be_folded(tiny_model, thresholds):
    with pytest.raises(ValueError, match="threshold"):
        fold_thresholds(tiny_model(act="relu"), thresholds, 0.2)


def test_folded_config_is_plain_llama(tiny_model):
    config = fold_scales(minicpm(tiny_model, True)).config
    assert "scale_emb" not in config.to_hf()
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("kind", ["lowrank", "sketch", "sign"])
def test_predictions_survive_a_folded_threshold(tiny_model, kind):
    model = tiny_model(act="fatrelu", act_param=0.2)
    rng = np.random.default_rng(0)
    networks = ()
    if kind == "lowrank":
        shapes = ((8, 96), (160, 8))
        networks = tuple(
            tuple(Tensor("F32", s, rng.standard_normal(s, np.float32).view(np.uint8)) for s in shapes)
            for _ in range(2)
        )
    seen = "residual" if kind == "lowrank" else "normed"
    model = replace(
        model, predictors=Predictors(kind, seen, (0.9, 0.99), ((0.5, 0.1), (0.3, -0.2)), 0.9, networks)
    )
    folded = fold_thresholds(model, [0.1, 0.4], 0.2)
    x = rng.standard_normal((50, 96)).astype(np.float32)
    for layer in range(2):

        def predicted(m, layer=layer):
            gate = m.tensors[f"model.layers.{layer}.mlp.gate_proj.weight"]
            weights = m.predictors.networks[layer] if kind == "lowrank" else (gate,)
            found = scores(kind, x, [w.dequantize() for w in weights])
            return [found >= np.float32(t) for t in m.predictors.thresholds[layer]]

        assert np.array_equal(predicted(model), predicted(folded))
    assert fold_scales(model).predictors is model.predictors
