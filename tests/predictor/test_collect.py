"""What is collected, against the model run sequence by sequence; resuming, disk bounds, refusals."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prosparse.predictor import collect as module  # noqa: E402
from prosparse.predictor.collect import PARTS, Settings, collect, fingerprint, unpack  # noqa: E402
from prosparse.sparsify import measure  # noqa: E402
from prosparse.sparsify.batches import Batch  # noqa: E402

D, D_FF, CONTEXT = 96, 160, 16
BOTH = Settings(context=CONTEXT, inputs=("residual", "normed"), clip=0.15)


def text(sequences: int, seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 256, (sequences, CONTEXT + 1))
    return Batch(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape, np.int32))


def parts_of(*sequences: int):
    return dict(zip(PARTS, (text(n, i) for i, n in enumerate(sequences)), strict=True))


@pytest.fixture
def model(tiny_model):
    return tiny_model(act="fatrelu_0.3")


@pytest.fixture
def trunk(model):
    return measure.load(model, "cpu")[0]


def test_files_hold_what_the_model_computes(trunk, model, tmp_path):
    parts = parts_of(5, 2, 3)
    got = collect(trunk, parts, tmp_path, BOTH, model=fingerprint(model), micro=3)
    assert (got.layers, got.d, got.d_ff) == (2, D, D_FF)
    assert got.sizes == {"train": 80, "calibrate": 32, "report": 48}
    for part, batch in parts.items():
        seen, hooks = {}, []

        def keep(key, seen=seen):
            return lambda _, x: seen.update({key: x[0]})

        for layer, (mlp, decoder) in enumerate(zip(trunk.mlps, trunk.layers, strict=True)):
            for name, of in (("normed", mlp), ("x1", mlp.down_proj)):
                hooks.append(of.register_forward_pre_hook(keep((name, layer))))
            norm = decoder.post_attention_layernorm
            hooks.append(norm.register_forward_pre_hook(keep(("residual", layer))))
        with torch.no_grad():
            trunk.hidden(torch.from_numpy(batch.tokens[:, :-1]))
        for hook in hooks:
            hook.remove()
        for layer in range(2):
            x1 = seen["x1", layer].flatten(0, 1).numpy()
            active = unpack(np.array(got.active(layer, part)), D_FF)
            # a gate that lies at the threshold may fall to either side
            assert (active != (x1 != 0)).sum() <= 2
            clipped = unpack(np.array(got.active(layer, part, clipped=True)), D_FF)
            for token, row in enumerate(np.abs(x1)):
                best = {j for j in np.argsort(-row)[: int(0.15 * D_FF)] if row[j]}
                assert len(best ^ set(np.flatnonzero(clipped[token]))) <= 2
            for name in ("normed", "residual"):
                rows = np.asarray(got.inputs(layer, name, part), np.float32)
                expected = seen[name, layer].flatten(0, 1).numpy()
                np.testing.assert_allclose(rows, expected, rtol=2e-3, atol=2e-3)


def test_an_interrupted_collection_goes_on_and_ends_alike(trunk, model, tmp_path, monkeypatch):
    parts = parts_of(7, 1, 2)
    whole = collect(trunk, parts, tmp_path / "a", BOTH, model=fingerprint(model), micro=2)
    monkeypatch.setattr(module, "_FLUSH", 4 * CONTEXT)

    class Killed(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 160
        if done >= 6 * CONTEXT:
            raise Killed

    with pytest.raises(Killed):
        collect(trunk, parts, tmp_path / "b", BOTH, model=fingerprint(model), micro=2, progress=stop)
    (part,) = (tmp_path / "b").glob(".*.part")
    assert json.loads((part / "done.json").read_text()) == {"sequences": 4}
    seen = []
    again = collect(
        trunk,
        parts,
        tmp_path / "b",
        BOTH,
        model=fingerprint(model),
        micro=2,
        progress=lambda n, _: seen.append(n),
    )
    assert seen[0] == 6 * CONTEXT
    assert again.folder.name == whole.folder.name
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == sorted(path.name for path in again.folder.iterdir())
    for name in names:
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_it_is_found_again_by_what_it_holds(trunk, model, tiny_model, tmp_path):
    parts = parts_of(3, 1, 1)
    first = collect(trunk, parts, tmp_path, BOTH, model=fingerprint(model))

    def never(*_):
        raise AssertionError("it ran again")

    for settings in (BOTH, Settings(context=CONTEXT), Settings(context=CONTEXT, inputs=("residual",))):
        found = collect(trunk, parts, tmp_path, settings, model=fingerprint(model), progress=never)
        assert found.folder == first.folder
    other = fingerprint(tiny_model(act="fatrelu_0.3", seed=1))
    assert other != fingerprint(model) != fingerprint(tiny_model(act="fatrelu_0.2"))
    for key, texts, settings in (
        (other, parts, BOTH),
        (fingerprint(model), parts_of(2, 2, 1), BOTH),
        (fingerprint(model), parts, Settings(context=CONTEXT, clip=0.3)),
    ):
        assert collect(trunk, texts, tmp_path, settings, model=key).folder != first.folder


def test_disk_is_bounded_before_it_starts(trunk, model, tmp_path):
    parts = parts_of(3, 1, 1)
    needed = module.disk_bytes(2, D, D_FF, 5 * CONTEXT, BOTH)
    assert needed == 2 * 5 * CONTEXT * (2 * 2 * D + 2 * D_FF // 8)
    tight = Settings(context=CONTEXT, inputs=BOTH.inputs, clip=0.15, max_gb=(needed - 1) / 1e9)
    with pytest.raises(ValueError, match="lower --tokens"):
        collect(trunk, parts, tmp_path, tight, model=fingerprint(model))
    exact = Settings(context=CONTEXT, inputs=BOTH.inputs, clip=0.15, max_gb=needed / 1e9)
    made = collect(trunk, parts, tmp_path, exact, model=fingerprint(model))
    assert sum(p.stat().st_size for p in made.folder.iterdir() if p.name != "meta.json") == needed


def test_numbers_that_are_not_finite_or_too_large(model, tmp_path):
    parts = parts_of(3, 1, 1)
    for factor, told in ((float("nan"), "not finite"), (1e6, "beyond float16")):
        trunk, _ = measure.load(model, "cpu")
        with torch.no_grad():
            trunk.layers[1].post_attention_layernorm.weight.mul_(factor)
        with pytest.raises(ValueError, match=told):
            collect(trunk, parts, tmp_path, Settings(context=CONTEXT), model=str(factor))
    with pytest.raises(ValueError, match="the model knows"):
        bad = {part: Batch(b.tokens + 1000, b.loss, b.document) for part, b in parts.items()}
        collect(trunk, bad, tmp_path, Settings(context=CONTEXT), model="x")


def test_the_model_is_left_as_it_was(trunk, model, tmp_path):
    trunk.model.train()
    before = [mlp.observe for mlp in trunk.mlps]
    collect(trunk, parts_of(1, 1, 1), tmp_path, BOTH, model=fingerprint(model))
    assert trunk.model.training
    assert [mlp.observe for mlp in trunk.mlps] == before
    assert not any(module._forward_pre_hooks for module in trunk.model.modules())


def test_split_by_whole_sequences():
    a, b = text(20, 0), text(7, 1)
    parts = module.split([a, b], 0.1)
    assert [len(parts[part].tokens) for part in PARTS] == [16 + 5, 2 + 1, 2 + 1]
    assert np.array_equal(parts["train"].tokens, np.concatenate([a.tokens[:16], b.tokens[:5]]))
    assert np.array_equal(parts["report"].tokens, np.concatenate([a.tokens[18:], b.tokens[6:]]))
    with pytest.raises(ValueError, match="3 are needed"):
        module.split([text(2)], 0.1)


@pytest.mark.parametrize("changes", [{"inputs": ()}, {"inputs": ("x",)}, {"clip": 0}, {"held_out": 0.5}])
def test_settings_that_are_refused(changes):
    with pytest.raises(ValueError):
        Settings(**changes)
