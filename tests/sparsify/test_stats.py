"""The verb `stats`: counts against brute force, and that damaged folders are told."""

import json

import numpy as np
import pytest

from prosparse import cli
from prosparse.formats.hf import write_folder
from prosparse.model.activation import Activation
from prosparse.sparsify import measure, stats
from prosparse.sparsify.batches import Batch
from prosparse.sparsify.stats import Stats

LAYERS, D_FF = 2, 160


def batch_of(sequences: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (sequences, 17))
    return Batch(tokens, rng.random(tokens.shape) < 0.5, np.zeros(tokens.shape, np.int32))


def made(sources: int = 2, seed: int = 0) -> Stats:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(50, 100, sources)
    counts = rng.integers(0, 50, (sources, 3, 20))
    counts[:, 0, :4] = 0
    losses = rng.random(sources)
    names = tuple(f"corpus {i}" for i in range(sources))
    return Stats("m.gguf", Activation("fatrelu", 0.25), names, tokens, losses, counts)


@pytest.mark.parametrize("act", ["silu", "relu", "fatrelu_0.3", "shiftrelu_0.2"])
@pytest.mark.parametrize("micro", [2, 8])
def test_counts_are_those_of_every_token(tiny_model, act, micro):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = tiny_model(act=act)
    trunk, _ = measure.load(model, "cpu")
    batches = {"a": batch_of(3, 0), "b": batch_of(4, 1)}
    got = stats.collect(trunk, batches, model="tiny", activation=model.config.activation, micro=micro)
    assert got.sources == ("a", "b")
    assert got.tokens.tolist() == [48, 64]
    assert got.counts.shape == (2, LAYERS, D_FF)
    assert got.counts.dtype == np.int64
    for source, (name, batch) in enumerate(batches.items()):
        expected = np.zeros((LAYERS, D_FF), np.int64)
        for tokens in batch.tokens:
            seen = []
            hooks = [
                mlp.down_proj.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
                for mlp in trunk.mlps
            ]
            with torch.no_grad():
                trunk.hidden(torch.from_numpy(tokens[None, :-1]))
            for hook in hooks:
                hook.remove()
            for layer, x1 in enumerate(seen):
                for at in range(16):
                    expected[layer] += x1[0, at].numpy() != 0
        # a gate that lies at the threshold may fall to either side
        assert np.abs(got.counts[source] - expected).sum() <= 2
        measured = measure.measure(trunk, batch, micro=micro)
        assert got.losses[source] == measured.loss
        np.testing.assert_allclose(got.sparsity[source], measured.sparsity, atol=1e-12)
        assert got.report()["sources"][name]["sparsity"] == pytest.approx(measured.sparsity.mean())
    assert np.array_equal(got.pooled, got.counts[0] + got.counts[1])
    np.testing.assert_allclose(got.frequencies, got.pooled / 112)
    if act == "silu":
        assert not got.sparsity.any()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 1.0])
def test_hot_neurons(share):
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 9, (5, 40)) ** 2
    counts[3] = 0
    counts[4] = 7
    for layer, got in enumerate(stats.hot_share(counts, share)):
        row = sorted(counts[layer].tolist(), reverse=True)
        k = next(k for k in range(41) if sum(row[:k]) >= share * sum(row))
        assert got == k / 40


def test_the_report():
    given = made()
    report = given.report()
    row = report["sources"]["corpus 0"]
    assert row["tokens"] == given.tokens[0]
    assert row["loss"] == given.losses[0]
    for layer in range(3):
        zeros = sum(int(given.tokens[0]) - int(c) for c in given.counts[0, layer])
        assert row["layer_sparsity"][layer] == pytest.approx(zeros / (20 * given.tokens[0]))
        assert row["layer_dead_neurons"][layer] == sum(c == 0 for c in given.counts[0, layer])
    assert row["dead_neurons"] == sum(row["layer_dead_neurons"])
    pooled = report["pooled"]
    assert pooled["tokens"] == given.tokens.sum()
    assert pooled["layer_dead_neurons"][0] >= 4
    # every source weighs by its tokens
    weights = given.tokens / given.tokens.sum()
    np.testing.assert_allclose(pooled["layer_sparsity"], weights @ given.sparsity)


def test_what_is_saved_is_loaded(tmp_path):
    given = made(3)
    given.save(tmp_path / "new" / "folder")
    again = stats.load(str(tmp_path / "new" / "folder"))
    assert (again.model, again.activation, again.sources) == (given.model, given.activation, given.sources)
    for name in ("tokens", "losses", "counts"):
        assert np.array_equal(getattr(again, name), getattr(given, name))
    with np.load(tmp_path / "new" / "folder" / "stats.npz") as arrays:
        assert set(arrays) == {"counts", "pooled", "tokens"}
        assert np.array_equal(arrays["pooled"], given.counts.sum(0))


def test_folders_that_do_not_hold_them(tmp_path):
    with pytest.raises(ValueError, match="prosparse stats --out"):
        stats.load(tmp_path)
    made(2).save(tmp_path)
    counts = (tmp_path / "stats.npz").read_bytes()
    (tmp_path / "stats.npz").write_bytes(counts[: len(counts) // 2])
    with pytest.raises(ValueError, match="no statistics that can be read"):
        stats.load(tmp_path)
    flipped = counts[:200] + bytes([counts[200] ^ 255]) + counts[201:]
    (tmp_path / "stats.npz").write_bytes(flipped)
    with pytest.raises(ValueError, match="no statistics that can be read"):
        stats.load(tmp_path)
    (tmp_path / "stats.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="no statistics that can be read"):
        stats.load(tmp_path)
    (tmp_path / "stats.npz").unlink()
    with pytest.raises(ValueError, match=r"stats\.npz is missing"):
        stats.load(tmp_path)
    made(2, seed=1).save(tmp_path)
    (tmp_path / "stats.npz").write_bytes(counts)
    with pytest.raises(ValueError, match="different runs"):
        stats.load(tmp_path)
    for text in ("[]", "{", '{"sources": 3}'):
        (tmp_path / "stats.json").write_text(text)
        with pytest.raises(ValueError, match="no statistics that can be read"):
            stats.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": ("a",)},
        {
            "sources": (),
            "tokens": np.zeros(0, int),
            "losses": np.zeros(0),
            "counts": np.zeros((0, 1, 1), int),
        },
        {"losses": np.array([1.0, np.nan])},
        {"tokens": np.array([0, 60])},
        {"tokens": np.array([10, 60])},
        {"counts": -np.ones((2, 3, 20), int)},
        {"counts": np.ones((2, 60), int)},
        {"counts": np.ones((3, 3, 20), int)},
    ],
)
def test_parts_that_do_not_fit(changes):
    given = made()
    fields = ("model", "activation", "sources", "tokens", "losses", "counts")
    with pytest.raises(ValueError):
        Stats(**{name: getattr(given, name) for name in fields} | changes)


@pytest.fixture
def folders(tmp_path, tiny_model):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for act in ("silu", "fatrelu_0.2"):
        write_folder(tmp_path / act, tiny_model(act=act), "F32")
    for name, text in (("letters", "abcdefgh "), ("digits", "0123456 ")):
        rows = [json.dumps({"text": text * 20})] * 5
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


def arguments(folders, act: str, *more: str) -> list[str]:
    data = [part for name in ("letters", "digits") for part in ("--data", str(folders / f"{name}.jsonl"))]
    sizes = ["--tokens", "256", "--context", "32", "--device", "cpu", "--json"]
    return ["stats", "-m", str(folders / act), *data, "--out", str(folders / "out"), *sizes, *more]


@pytest.mark.parametrize("act", ["silu", "fatrelu_0.2"])
def test_the_verb(folders, capsys, act):
    pytest.importorskip("matplotlib")
    assert cli.main(arguments(folders, act)) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((folders / "out" / "stats.json").read_text())
    loaded = stats.load(folders / "out")
    assert loaded.report() == result
    assert [row["tokens"] for row in result["sources"].values()] == [256, 256]
    assert (folders / "out" / "stats.png").read_bytes().startswith(b"\x89PNG")
    assert ("silu has no exact zeros" in out) == (act == "silu")
    if act == "silu":
        assert result["pooled"]["sparsity"] == 0
        assert result["pooled"]["hot_neurons"] == [0.8, 0.8]
    else:
        assert 0.4 < result["pooled"]["sparsity"] < 0.9
        assert (loaded.frequencies <= 1).all()
    # the same again takes the place of what is there
    assert cli.main(arguments(folders, act)) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.jsonl"], "does not exist"),
        (["--context", "4096", "--tokens", "4096"], "lower --context"),
        (["--tokens", "8"], "raise --tokens"),
    ],
)
def test_mistakes(folders, capsys, more, message):
    assert cli.main(arguments(folders, "silu", *more)) == 2
    assert message in capsys.readouterr().err
    assert cli.main(arguments(folders, "silu", "--data", str(folders / "letters.jsonl"))) == 2
    assert "there twice" in capsys.readouterr().err
    assert not (folders / "out").exists()
