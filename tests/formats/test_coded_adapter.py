"""Adapters with coded changes: the file, read also as docs/formats.md says; mixed with factors; the verb."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_adapter import GATE, KEYS, STEM, distance, rewritten, tuned_by

import naive_codes
from prosparse.cli import main
from prosparse.formats import adapter as files
from prosparse.formats import builtin, open_model
from prosparse.formats.convert import convert, write_model
from prosparse.formats.gguf import read_gguf, write_gguf
from prosparse.model.activation import Activation
from prosparse.model.adapter import ATTENTION, FFN, apply, extract, kept, kind_of, parse_levels
from prosparse.model.coded import Coded, encoded, float16
from prosparse.model.factors import Factors
from prosparse.model.model import Tensor, float32

SCALES = {"gate_proj": 1.9, "up_proj": 0.7}  # as folded thresholds leave them
CODES = {2: {-1, 1}, 3: {-1, 0, 1}, 5: {-2, -1, 0, 1, 2}}  # by levels
MIXED = {"levels": dict.fromkeys(FFN, 3), "ranks": dict.fromkeys(ATTENTION, 4)}


def tune(base, levels, seed=1):
    """`base` with a coded change of each matrix."""
    rng = np.random.default_rng(seed)

    def change(kind, values):
        steps = (0.01 + 0.01 * rng.random((len(values), 1))).astype(np.float16).astype(np.float32)
        codes = np.where(rng.random(values.shape) < 0.5, np.float32(-1), np.float32(1))
        if levels[kind] > 2:
            codes *= rng.random(values.shape) > 0.3
        if levels[kind] == 5:
            codes *= 1 + (rng.random(values.shape) > 0.5)
        return np.float32(SCALES.get(kind, 1)) * (values + steps * codes)

    return tuned_by(change, base, rng)


@pytest.fixture
def base(tiny_model):
    return tiny_model(type="Q4_1", hidden=64, intermediate=96, tied=True)


@pytest.fixture(params=["3", "2", "5", "3:2", "3,gate_proj=2,v_proj=5"])
def levels(request):
    return parse_levels(request.param)


@pytest.fixture
def tuned(base, levels):
    return tune(base, levels)


@pytest.fixture
def path(base, tmp_path):
    """An adapter file with codes of 3 levels in FFNs, and of 2 in attention."""
    levels = parse_levels("3:2")
    files.write(tmp_path / "a.gguf", extract(base, tune(base, levels), levels=levels))
    return tmp_path / "a.gguf"


def test_a_coded_change_is_found_exactly(base, tuned, levels):
    made = extract(base, tuned, levels=levels)
    assert apply(base, made).config == tuned.config
    assert distance(apply(base, made), tuned) < 1e-5 * distance(base, tuned)
    for name, change in made.matrices.items():
        assert set(np.unique(change.codes())) == CODES[levels[kind_of(name)]]
        scale = SCALES.get(kind_of(name), 1)
        assert change.scale == pytest.approx(scale, rel=2e-7)
        difference = tuned.tensors[name].dequantize() / scale - base.tensors[name].dequantize()
        steps = np.abs(difference).max(axis=1) / (2 if levels[kind_of(name)] == 5 else 1)
        assert np.array_equal(change.steps.data, float16(steps).data)
    assert all(share == pytest.approx(1, abs=1e-6) for share in kept(base, tuned, made).values())


def test_the_file_holds_everything(base, tuned, levels, tmp_path):
    made = replace(extract(base, tuned, levels=levels), license="Apache-2.0", measured={"ppl": 12.5})
    files.write(tmp_path / "a.gguf", files.with_types(made, "Q4_0"))  # which is of factors
    again = files.read(tmp_path / "a.gguf")
    assert (again.license, again.measured) == ("Apache-2.0", {"ppl": 12.5})
    assert again.size_bytes == made.size_bytes and again.matrices.keys() == made.matrices.keys()
    for name, change in made.matrices.items():
        theirs = again.matrices[name]
        numbers = [(c.scale, c.columns, c.shape) for c in (theirs, change)]
        assert numbers[0] == numbers[1]
        assert np.array_equal(theirs.steps.data, change.steps.data)
        assert np.array_equal(theirs.stream.data, change.stream.data)
        assert theirs.column_steps is None
    files.write(tmp_path / "b.gguf", again)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def with_column_steps(made):
    """The adapter with steps of columns, which are 1 and 2 in turns."""
    matrices = {
        name: replace(change, column_steps=float16(1 + np.arange(change.columns) % 2))
        for name, change in made.matrices.items()
    }
    return replace(made, matrices=matrices)


@pytest.mark.parametrize("with_columns", [False, True])
def test_the_file_is_as_documented(base, tmp_path, with_columns):
    """Read by the package gguf, and decoded in loops, in float64."""
    from gguf import GGMLQuantizationType, GGUFReader

    path, levels = tmp_path / "a.gguf", parse_levels("5:3")
    made = extract(base, tune(base, levels), levels=levels)
    files.write(path, with_column_steps(made) if with_columns else made)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    merged = apply(base, files.read(path))
    for name in (GATE, KEYS):
        stem = name.removesuffix(".weight")
        scale, columns = (float(value) for value in stored[f"{stem}.coding"].data)
        steps, codes = stored[f"{stem}.steps"].data, stored[f"{stem}.codes"]
        assert steps.dtype == np.float16 and codes.tensor_type == GGMLQuantizationType.I8
        result = base.tensors[name].dequantize().astype(float)
        assert (len(steps), int(columns)) == result.shape
        found = np.array(naive_codes.decoded(codes.data.view(np.uint8), *result.shape))
        result += steps.astype(float)[:, None] * found * (1 + with_columns * (np.arange(columns) % 2))
        assert np.abs(merged.tensors[name].dequantize() - scale * result).max() < 1e-6


def test_factors_and_codes_in_one_file(base, tmp_path):
    tuned = tune(base, parse_levels("3"))
    files.write(tmp_path / "a.gguf", files.with_types(extract(base, tuned, **MIXED), "Q8_0"))
    made = files.read(tmp_path / "a.gguf")
    assert isinstance(made.matrices[GATE], Coded) and isinstance(made.matrices[KEYS], Factors)
    assert made.matrices[KEYS].a.type == "Q8_0" and made.matrices[KEYS].a.shape == (4, 64)
    shares = kept(base, tuned, made)
    assert shares["up_proj"] > 0.9999 and 0.1 < shares["q_proj"] < 0.9


def test_every_kind_has_one_form(base):
    for ranks, levels in (
        (None, None),
        (4, 3),
        (None, {"up_proj": 3}),
        (MIXED["ranks"], parse_levels("3")),
        (dict.fromkeys(ATTENTION, 0), dict.fromkeys(FFN, 2)),
    ):
        with pytest.raises(ValueError, match=r"ranks of at least 1 are needed for .*, or levels"):
            extract(base, base, ranks, levels)
    with pytest.raises(ValueError, match="4 levels are not known"):
        extract(base, base, levels=4)


def test_another_base(base):
    tensors = dict(base.tensors) | {GATE: float32(-base.tensors[GATE].dequantize())}
    other = replace(base, tensors=tensors, name="other")
    with pytest.raises(ValueError, match=rf"tensor {GATE} of other: nothing of the base is left"):
        extract(base, other, levels=3)


def test_nothing_changed(base):
    for levels in (2, 3, 5):
        made = extract(base, base, levels=levels)
        assert distance(apply(base, made), base) == 0
        assert set(kept(base, base, made).values()) == {1.0}


def test_factors_of_what_has_not_changed(base, tmp_path):
    """As kinds with 0 levels come out of training."""
    original = base.tensors[KEYS].dequantize()
    tuned = replace(base, tensors=dict(base.tensors) | {KEYS: float32(original)})
    made = extract(base, tuned, dict.fromkeys(ATTENTION, 1), dict.fromkeys(FFN, 3))
    for kind in ("F32", "Q8_0"):
        files.write(tmp_path / "a.gguf", files.with_types(made, kind))
        again = files.read(tmp_path / "a.gguf")
        assert again.matrices[KEYS].scale == 1 and not again.matrices[KEYS].a.dequantize().any()
        assert np.array_equal(apply(base, again).tensors[KEYS].dequantize(), original)
        assert set(kept(base, tuned, again).values()) == {1.0}


def coding(*values):
    return float32(np.array(values))


def data(*values):
    return Tensor("I8", np.shape(values), np.array(values, np.uint8))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{STEM}.codes": None}, rf"tensor {STEM}\.codes is missing"),
        ({f"{STEM}.steps": None}, rf"tensor {STEM}\.steps is missing"),
        ({f"{STEM}.coding": None}, rf"tensor {STEM}\.(steps|codes) .* is no part of an adapter"),
        ({f"{STEM}.coding": coding(1, 3, 64)}, rf"{STEM}: coding must be 2 F32, not F32 \(3,\)"),
        ({f"{STEM}.coding": coding(1, 63.5)}, "63.5 columns must be a whole number"),
        ({f"{STEM}.coding": coding(1, 0)}, f"{STEM}: codes must be I8 .* of 0 columns"),
        ({f"{STEM}.coding": coding(1, -4)}, "codes must be I8"),
        ({f"{STEM}.coding": coding(0, 64)}, f"{STEM}: a scale must be finite and above 0, not 0.0"),
        ({f"{STEM}.coding": coding(-1, 64)}, "a scale must be finite and above 0, not -1.0"),
        ({f"{STEM}.coding": coding(np.nan, 64)}, rf"tensor {STEM}\.coding: NaN"),
        ({f"{STEM}.codes": data([1, 2])}, "codes must be I8"),
        ({f"{STEM}.codes": float32(np.ones(13))}, "codes must be I8 .* not F32"),
        ({f"{STEM}.steps": float32(np.ones(96))}, "steps must be F16, one for each row, not F32"),
        ({f"{STEM}.steps": float16(np.ones((96, 1)))}, "steps must be F16, one for each row, not F16"),
        ({f"{STEM}.steps": data(*range(96))}, rf"tensor {STEM}\.steps: type I8 is of codes"),
        ({f"{STEM}.steps": float16(np.full(96, np.inf))}, rf"tensor {STEM}\.steps: NaN or infinite"),
        ({f"{STEM}.steps": float16(np.full(96, -1.0))}, "a step is NaN, infinite or below 0"),
        ({f"{STEM}.column_steps": float16(np.ones(63))}, "one for each column, not F16 .* for 64 columns"),
        ({f"{STEM}.column_steps": float16(np.full(64, np.nan))}, r"column_steps: NaN or infinite"),
        ({"extra.codes": data(3, 3)}, "tensor extra.codes .* is no part of an adapter"),
        ({"extra.column_steps": float16([1])}, "tensor extra.column_steps .* is no part of an adapter"),
        ({"model.norm.weight": data(3, 3)}, r"model\.norm\.weight: type I8 is of codes"),
        (
            {f"{STEM}.{part}": float32(np.ones(shape)) for part, shape in {"scales": 2, "A": (4, 64)}.items()}
            | {f"{STEM}.B": float32(np.ones((4, 96)))},
            f"{STEM} has both factors and codes",
        ),
    ],
)
def test_bad_files(path, tensors, message):
    bad = rewritten(path, {}, tensors)
    with pytest.raises(ValueError, match=message) as error:
        files.read(bad)
    assert str(error.value).startswith(str(bad))


@pytest.mark.parametrize(
    ("tensors", "there"),
    [({f"{STEM}.coding": coding(1, 65)}, "96, 65"), ({f"{STEM}.steps": float16(np.ones(95))}, "95, 64")],
)
def test_another_shape(base, path, tensors, there):
    made = files.read(rewritten(path, {}, tensors))
    with pytest.raises(ValueError, match=rf"gate_proj.* \({there}\) there, \(96, 64\) here"):
        apply(base, made)


def test_codes_of_another_shape(base, path):
    made = files.read(rewritten(path, {}, {f"{STEM}.codes": encoded(np.ones((96, 63)))}))
    with pytest.raises(ValueError, match=rf"tensor {GATE} of the adapter: the bytes are not those of codes"):
        apply(base, made).tensors[GATE].dequantize()


def test_damage_and_truncation(path):
    whole = path.read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            files.read(path)
    place = len(whole) - 200
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="damaged"):
        files.read(path)


def test_codes_are_no_weights(base, tmp_path):
    write_model(tmp_path / "base.gguf", base)
    file = read_gguf(tmp_path / "base.gguf")
    for name in ("blk.0.ffn_gate.weight", "output_norm.weight", "token_embd.weight"):
        shape = file.tensors[name].shape
        tensor = Tensor("I8", shape, np.zeros(shape, np.uint8))
        write_gguf(tmp_path / "bad.gguf", file.metadata, dict(file.tensors) | {name: tensor})
        with pytest.raises(ValueError, match=rf"bad\.gguf: tensor {name}: type I8 is of codes"):
            open_model(tmp_path / "bad.gguf")


@pytest.fixture
def folder(base, tmp_path):
    """base.gguf, and tuned.gguf with codes of 3 levels everywhere."""
    write_model(tmp_path / "base.gguf", base, {"general.license": "mit"})
    write_model(tmp_path / "tuned.gguf", tune(base, parse_levels("3")))
    return tmp_path


def convert_to_adapter(folder, *options):
    paths = [str(folder / name) for name in ("tuned.gguf", "a.gguf")]
    return main(["convert", *paths, "--base", str(folder / "base.gguf"), *options])


def test_the_verb(folder, capsys):
    assert convert_to_adapter(folder, "--levels", "3", "--name", "N", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kept of the squared difference: q_proj 100.0%" in lines[0]
    assert min(json.loads(lines[-1])["kept"].values()) > 0.9999
    made = files.read(folder / "a.gguf")
    assert (made.name, made.license) == ("N", "mit")
    assert main(["inspect", str(folder / "a.gguf"), "--json"]) == 0

    paths = [str(folder / name) for name in ("base.gguf", "out.gguf")]
    assert main(["convert", *paths, "--adapter", str(folder / "a.gguf"), "--type", "f32"]) == 0
    merged, tuned = (open_model(folder / f"{name}.gguf") for name in ("out", "tuned"))
    assert merged.config == tuned.config and merged.name == "N"
    assert distance(merged, tuned) < 1e-5 * distance(open_model(folder / "base.gguf"), tuned)


def test_levels_of_one_kind_and_ranks_of_the_other(folder):
    assert convert_to_adapter(folder, "--levels", "3:0", "--rank", "5", "--type", "f16") == 0
    made = files.read(folder / "a.gguf")
    assert set(np.unique(made.matrices[GATE].codes())) == CODES[3]
    assert (made.matrices[KEYS].a.type, made.matrices[KEYS].a.shape) == ("F16", (5, 64))
    assert convert_to_adapter(folder, "--levels", "0:2") == 0
    made = files.read(folder / "a.gguf")
    assert made.matrices[GATE].a.shape == (64, 64)
    assert set(np.unique(made.matrices[KEYS].codes())) == CODES[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "4"], "levels are 2, 3 or 5"),
        (["--levels", "3:"], "levels are 2, 3 or 5"),
        (["--levels", "3", "--rank", "8"], "--levels 3 leaves no factors, of which --rank and --type are"),
        (["--levels", "3:2", "--type", "q4_0"], "--levels 3:2 leaves no factors"),
        (["--levels", "3:0", "--rank", "80:32"], "--rank 80:32 has a rank too many"),
    ],
)
def test_options_that_do_not_fit(folder, capsys, options, message):
    assert convert_to_adapter(folder, *options) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "a.gguf").exists()


def test_levels_without_a_base(folder, capsys):
    paths = [str(folder / name) for name in ("tuned.gguf", "out.gguf")]
    assert main(["convert", *paths, "--levels", "3"]) == 2
    assert "--levels is of an adapter to be written: add --base" in capsys.readouterr().err


def test_the_built_in_model(folder, path, monkeypatch):
    monkeypatch.setattr(builtin, "ADAPTER", path)
    monkeypatch.setattr(builtin, "original_path", lambda: folder / "base.gguf")
    monkeypatch.setenv("PROSPARSE_CACHE", str(folder / "cache"))
    model, expected = open_model("demo"), apply(open_model(folder / "base.gguf"), files.read(path))
    assert model.config.activation == Activation("fatrelu", 0.25)
    values = expected.tensors[GATE].dequantize()
    assert np.abs(model.tensors[GATE].dequantize() - values).max() < 0.01 * np.abs(values).max()


def test_merged_into_a_folder(folder, path):
    convert(folder / "base.gguf", folder / "hf", "F32", adapter=path)
    merged, expected = open_model(folder / "hf"), apply(open_model(folder / "base.gguf"), files.read(path))
    assert distance(merged, expected) == 0


def test_the_adapter_that_is_shipped():
    made = files.read(builtin.ADAPTER)
    assert made.size_bytes < 20e6 and all(isinstance(change, Coded) for change in made.matrices.values())
