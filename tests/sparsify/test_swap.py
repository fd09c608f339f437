"""Substitution on small random models of every family."""

import numpy as np
import pytest

from prosparse.model.activation import NAMES, Activation

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from prosparse.sparsify import swap  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
IDS = torch.arange(1, 20)[None]


def tiny(family: str):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, head_dim=8)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = tiny(family)
    names = set(model.state_dict())
    before = model(IDS).logits
    same = Activation("gelu") if family == "gemma" else Activation("silu")
    mlps = swap.substitute(model, same)
    assert len(mlps) == 3
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(IDS).logits, before)
    counts = []
    (*_, last) = swap.substitute(model, Activation("fatrelu", 0.01))
    last.observe = lambda x1: counts.append((x1 == 0).float().mean().item())
    after = model(IDS).logits
    assert not torch.allclose(after, before)
    assert 0.3 < counts[0] < 1
    assert (model.config.hidden_act, model.config.hidden_act_param) == ("fatrelu", 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_arrays_agree(name):
    param = 0.5 if name in ("fatrelu", "shiftrelu") else 0.0
    x = np.linspace(-3, 3, 241, dtype=np.float32)  # meets the threshold exactly
    want = Activation(name, param)(x)
    got = swap.activate(name, torch.from_numpy(x), torch.tensor(param)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_threshold_is_compared_in_float32():
    below = torch.tensor([0.0299], dtype=torch.bfloat16)
    kept = torch.tensor([0.0301], dtype=torch.bfloat16)
    assert below.item() < 0.03 < kept.item()
    assert swap.activate("fatrelu", below, torch.tensor(0.03)).item() == 0
    assert swap.activate("fatrelu", kept, torch.tensor(0.03)) == kept


def test_gradients_pass_active_neurons_only():
    x = torch.tensor([-1.0, 0.2, 0.5, 2.0], requires_grad=True)
    swap.activate("fatrelu", x, torch.tensor(0.5)).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1]


def test_models_without_a_gated_mlp_are_refused():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    with pytest.raises(ValueError, match="gpt2 has no gated MLP"):
        swap.substitute(transformers.GPT2LMHeadModel(config), Activation("relu"))


def test_mlps_that_do_more_are_refused():
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + x
    with pytest.raises(ValueError, match=r"layers\.1\.mlp computes something else"):
        swap.substitute(model, Activation("relu"))


def test_several_mlps_a_layer_are_refused():
    model = tiny("llama")
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="3 gated MLPs in 2 layers"):
        swap.substitute(model, Activation("relu"))
