"""PowerInfer's placement files and activation statistics: bytes, choice of neurons, damaged files."""

import io
import pickle
import random
import struct
import zipfile
from dataclasses import replace

import numpy as np
import powerinfer_reader
import pytest
from test_predictor_gguf import predictors

from prosparse.formats.activation_pt import (
    packed,
    read_activation,
    read_activations,
    unpacked,
    write_activations,
)
from prosparse.formats.convert import write_model
from prosparse.formats.convert_powerinfer import convert_for_powerinfer
from prosparse.formats.gguf import read_gguf
from prosparse.formats.gpuidx import Placement, hottest, parse_gpuidx, place, read_gpuidx, write_gpuidx
from prosparse.formats.open import open_model
from prosparse.formats.powerinfer import prepare
from prosparse.model.activation import Activation
from prosparse.sparsify.stats import Stats


def counts(layers=12, d_ff=300, seed=0):
    """Heavy-tailed, as neurons are."""
    return np.random.default_rng(seed).pareto(1.0, (layers, d_ff)).astype(np.int64)


def test_a_placement_is_written_as_documented(tmp_path):
    on_gpu = np.zeros((12, 5), bool)
    on_gpu[0, [0, 3]] = True
    on_gpu[10] = True
    path = tmp_path / "m.gguf.generated.gpuidx"
    write_gpuidx(path, Placement(on_gpu, 7))
    keys, tensors = powerinfer_reader.read(path.read_bytes())
    assert list(keys.items()) == [
        ("general.architecture", (8, "generic.gpu_index")),
        ("generic.gpu_index.block_count", (4, 12)),
        ("split.vram_capacity", (10, 7)),
    ]
    names = [f"blk.{i}.{part}" for i in range(12) for part in ("gpu_idx", "gpu_bucket")]
    assert list(tensors) == names  # in numeric order: 2 before 10
    assert {tensor.kind for tensor in tensors.values()} == {powerinfer_reader.I32}
    assert tensors["blk.0.gpu_idx"].values().tolist() == [1, 0, 0, 1, 0]
    assert tensors["blk.0.gpu_bucket"].values().tolist() == [0, 3]
    assert tensors["blk.1.gpu_bucket"].shape == (0,)
    assert tensors["blk.10.gpu_bucket"].values().tolist() == [0, 1, 2, 3, 4]
    again = read_gpuidx(path)
    assert np.array_equal(again.on_gpu, on_gpu) and again.capacity == 7


def by_hand(n=1, tensors=(), capacity=(10, "Q", 0), architecture="generic.gpu_index", magic=b"PWRI"):
    """A placement file from its parts."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    data = magic + struct.pack("<IQQ", 3, len(tensors), 3 if capacity else 2)
    data += text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    data += text("generic.gpu_index.block_count") + struct.pack("<II", 4, n)
    if capacity:
        data += text("split.vram_capacity") + struct.pack("<I" + capacity[1], capacity[0], capacity[2])
    for i, (name, values) in enumerate(tensors):
        data += text(name) + struct.pack("<IQIQ", 1, len(values), 18, 32 * i)
    data += bytes(-len(data) % 32)
    return data + b"".join(np.array(v, "<i4").tobytes().ljust(32, b"\0") for _, v in tensors)


GOOD = [("blk.0.gpu_idx", [1, 0, 1]), ("blk.0.gpu_bucket", [0, 2])]


def test_the_same_bytes_by_hand(tmp_path):
    write_gpuidx(tmp_path / "a", Placement(np.array([[True, False, True]]), 0))
    assert (tmp_path / "a").read_bytes() == by_hand(tensors=GOOD)


BAD = {
    "order": (by_hand(tensors=GOOD[::-1]), r"tensor 0 must be the list blk\.0\.gpu_idx"),
    "name": (by_hand(tensors=[("blk.1.gpu_idx", [1, 0, 1]), GOOD[1]]), "must be the list"),
    "numbers": (by_hand(tensors=[("blk.0.gpu_idx", [1, 0, 2]), GOOD[1]]), "other than 0 and 1"),
    "bucket": (by_hand(tensors=[GOOD[0], ("blk.0.gpu_bucket", [0, 1])]), "does not list the neurons"),
    "unsorted": (by_hand(tensors=[GOOD[0], ("blk.0.gpu_bucket", [2, 0])]), "does not list the neurons"),
    "empty": (by_hand(tensors=[("blk.0.gpu_idx", []), ("blk.0.gpu_bucket", [])]), "has 0 neurons"),
    "count": (by_hand(2, tensors=GOOD), "not two for each of 2 layers"),
    "none": (by_hand(0), "not two for each of 0 layers"),
    "capacity": (by_hand(tensors=GOOD, capacity=None), r"split\.vram_capacity must be an integer"),
    "negative": (by_hand(tensors=GOOD, capacity=(11, "q", -1)), "must be an integer, not -1"),
    "architecture": (by_hand(tensors=GOOD, architecture="llama"), "not a placement file"),
    "magic": (by_hand(tensors=GOOD, magic=b"GGUF"), "not a placement file"),
    "cut": (by_hand(tensors=GOOD)[:-40], "over the end"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_placements(case):
    data, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        parse_gpuidx(data, "bad.gpuidx")
    assert str(error.value).startswith("bad.gpuidx: ")


def test_a_placement_is_not_a_model(tmp_path):
    (tmp_path / "m.gguf").write_bytes(by_hand(tensors=GOOD))
    with pytest.raises(ValueError, match="type 18 is not supported"):
        open_model(tmp_path / "m.gguf")


def test_mutated_placements():
    data = by_hand(tensors=GOOD)
    opened = 0
    for i in range(500):
        rng = random.Random(i)
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 255, rng.randrange(256)])
        changed = changed[: rng.choice([len(data), len(data), rng.randrange(len(data))])]
        try:
            parse_gpuidx(bytes(changed), "fuzz")
            opened += 1
        except ValueError as error:
            assert str(error)
    assert opened < 300


@pytest.mark.parametrize("n", [0, 1, 17, 900, 3599, 3600, 10_000])
def test_the_hottest_of_all_layers(n):
    found = counts()
    on_gpu = hottest(found, n)
    assert on_gpu.sum() == min(n, found.size)
    # no neuron that was left out is more active than one that was taken
    if 0 < on_gpu.sum() < found.size:
        assert found[on_gpu].min() >= found[~on_gpu].max()


def test_groups_are_the_best_there_are():
    """Against every way to take whole groups, layer by layer."""
    found = counts(layers=3, d_ff=10, seed=4)
    on_gpu = hottest(found, 9, group=4)
    assert (on_gpu.sum(1) % 4 == 0).all() and on_gpu.sum() == 8
    ranked = -np.sort(-found)
    best = max(
        sum(ranked[layer, : 4 * k].sum() for layer, k in enumerate((a, b, c)))
        for a in range(3)
        for b in range(3)
        for c in range(3)
        if a + b + c == 2
    )
    assert found[on_gpu].sum() == best
    assert hottest(found, 10_000, group=4).sum() == 3 * 8  # the two over are not placed


@pytest.fixture
def model(tiny_model):
    """Any d_ff will do; a single group of 256 for Q4_0."""
    model = tiny_model(act="relu", intermediate=288, layers=2)
    return replace(model, predictors=predictors(model.config))


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_a_budget_is_filled_and_never_exceeded(model, kind):
    tensors, found = prepare(model, kind).tensors, counts(2, 288)
    per_neuron = 3 * 96 * 2 if kind == "F16" else 3 * 96 // 32 * 18
    per_group = per_neuron * (1 if kind == "F16" else 256)
    skipped = ("token_embd", "ffn_gate", "ffn_up", "ffn_down_t")
    fixed = sum(t.nbytes for name, t in tensors.items() if name.split(".")[-2] not in skipped)
    for budget in (fixed, fixed + per_group - 1, fixed + per_group, fixed + 2 * per_group + 5, 1 << 30):
        placement = place(tensors, found, budget)
        assert placement.capacity == placement.on_gpu.sum() * per_neuron <= budget - fixed
        assert (placement.on_gpu.sum(1) % (per_group // per_neuron) == 0).all()
        room = min(budget - fixed - placement.capacity, (~placement.on_gpu).sum() * per_neuron)
        assert room < per_group or placement.on_gpu.sum() == 2 * (288 if kind == "F16" else 256)
    with pytest.raises(ValueError, match="has no room for attention, predictors and output"):
        place(tensors, found, fixed - 1)
    with pytest.raises(ValueError, match=r"statistics are of .*\(3, 288\), the model has \(2, 288\)"):
        place(tensors, counts(3, 288), 1 << 30)


def test_types_without_kernels_on_a_gpu(model):
    with pytest.raises(ValueError, match="F16 and Q4_0 on a GPU, not Q8_0: use --type f16 or q4_0"):
        place(prepare(model, "Q8_0").tensors, counts(2, 288), 1 << 30)


def stats_folder(folder, pooled):
    one = Stats(
        "tiny",
        Activation("relu"),
        ("a", "b"),
        np.array([10_000, 20_000]),
        np.array([1.0, 2.0]),
        np.stack([np.minimum(pooled, 9_000), np.clip(pooled - 9_000, 0, 20_000)]),
    )
    one.save(folder)
    return one.pooled


def test_from_stats_to_a_directory_for_powerinfer(model, tmp_path):
    pooled = stats_folder(tmp_path / "stats", np.minimum(counts(2, 288), 20_000))
    write_model(tmp_path / "m.gguf", model)
    target = tmp_path / "out" / "m.powerinfer.gguf"
    skipped = ("token_embd", "ffn_gate", "ffn_up", "ffn_down_t")
    tensors = prepare(model, "F16").tensors
    fixed = sum(t.nbytes for name, t in tensors.items() if name.split(".")[-2] not in skipped)
    budget = (fixed + 200 * 576) / 2**30  # 200 neurons
    _, notes = convert_for_powerinfer(
        tmp_path / "m.gguf", target, "F16", statistics=tmp_path / "stats", vram_budget=budget
    )
    assert any("of the neurons are placed on the GPU" in note for note in notes)
    assert np.array_equal(read_activations(tmp_path / "out" / "activation"), pooled)
    placement = read_gpuidx(tmp_path / "out" / "m.powerinfer.gguf.generated.gpuidx")
    assert placement.on_gpu.sum() == 200 and placement.capacity == 200 * 576
    again = place(read_gguf(target).tensors, pooled, fixed + 200 * 576)
    assert np.array_equal(again.on_gpu, placement.on_gpu)
    # PowerInfer's own statistics do too; and an older placement is pointed out
    _, notes = convert_for_powerinfer(
        tmp_path / "m.gguf", target, "F16", statistics=tmp_path / "out" / "activation"
    )
    assert any("is of an earlier file, and PowerInfer will use it" in note for note in notes)


def test_statistics_that_do_not_fit(model, tmp_path):
    write_model(tmp_path / "m.gguf", model)
    stats_folder(tmp_path / "stats", counts(3, 288).clip(0, 20_000))
    target = tmp_path / "out" / "m.gguf"
    for options, message in [
        (
            {"statistics": tmp_path / "stats"},
            r"\(3, 288\), the model has \(2, 288\)",
        ),
        ({"statistics": tmp_path / "none"}, "prosparse stats"),
        ({"vram_budget": 1.0}, "give --activation-stats DIR"),
        ({"statistics": tmp_path / "stats", "vram_budget": float("nan")}, "a size in GiB"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_for_powerinfer(tmp_path / "m.gguf", target, **options)
    assert not (tmp_path / "out").exists()
    write_activations(tmp_path / "out" / "activation", counts(3, 288))
    stats_folder(tmp_path / "stats", counts(2, 288).clip(0, 20_000))
    with pytest.raises(ValueError, match=r"activation_2\.pt is of a model with more layers"):
        convert_for_powerinfer(tmp_path / "m.gguf", target, statistics=tmp_path / "stats")
    assert not target.exists()


def test_activations_there_and_back(tmp_path):
    found = counts(11, 5)
    found[3, 2] = 2**40
    write_activations(tmp_path, found)
    assert np.array_equal(read_activations(tmp_path), found)
    assert read_activations(tmp_path).dtype == np.int64
    assert packed(found[0]) == packed(found[0].astype(np.int32))  # no dates, no machine
    (tmp_path / "activation_4.pt").unlink()
    with pytest.raises(ValueError, match=r"holds 10 files activation_N\.pt, but no activation_4\.pt"):
        read_activations(tmp_path)
    with pytest.raises(ValueError, match=r"no activation_0\.pt"):
        read_activations(tmp_path / "nowhere")
    (tmp_path / "activation_4.pt").write_bytes(packed(np.arange(4)))
    with pytest.raises(ValueError, match="4 neurons, the first layer 5"):
        read_activations(tmp_path)


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    write_activations(tmp_path, counts(1, 300))
    found = torch.load(tmp_path / "activation_0.pt", weights_only=True)
    assert found.dtype == torch.int64 and np.array_equal(found.numpy(), counts(1, 300)[0])
    found = torch.load(tmp_path / "activation_0.pt", weights_only=True, mmap=True)
    assert int(found.sum()) == counts(1, 300).sum()


def test_we_read_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "activation_0.pt"
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
    for name in names:
        values = torch.arange(100).to(getattr(torch, name))
        for protocol in (2, 3, 4, 5):
            torch.save(values, path, pickle_protocol=protocol)
            found = read_activation(path)
            assert found.dtype == (np.int64 if "int" in name else np.float64)
            assert found.tolist() == list(range(100))
        torch.save(values[7:9], path)  # a view of the same storage
        assert read_activation(path).tolist() == [7, 8]
    for value, message in [
        (torch.zeros(2, 3), "one vector"),
        (torch.zeros(0), "outside of its numbers"),
        (torch.arange(10)[::2], "outside of its numbers"),
        (torch.tensor([1.0, float("nan")]), "no number"),
        (torch.tensor([-1]), "negative"),
        ({"a": torch.zeros(3)}, "pickle"),
        ([1, 2], "pickle"),
        (torch.zeros(3, dtype=torch.complex64), "one vector"),
        (torch.nn.Parameter(torch.zeros(3)), "pickle calls"),
    ]:
        torch.save(value, path)
        with pytest.raises(ValueError, match=message):
            read_activation(path)
    torch.save(torch.zeros(3), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not the activation statistics"):
        read_activation(path)


def archive(pickled, compression=zipfile.ZIP_STORED, **members):
    buffer = io.BytesIO()
    members = {"data.pkl": pickled, "data/0": bytes(24), "version": b"3\n"} | members
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"a/{name}", content)
    return buffer.getvalue()


def test_nothing_in_a_file_runs(tmp_path):
    mark = tmp_path / "mark"

    class Writes:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    for protocol in range(6):
        data = archive(pickle.dumps(Writes(), protocol))
        with pytest.raises(ValueError, match="the pickle"):
            unpacked(data, "bad.pt")
    assert not mark.exists()
    laughs = b"\x80\x02)" + b"q\x00h\x00\x86" * 2000 + b")R."  # tuples that double two thousand times
    deep = b"\x80\x02)" + b"\x85" * 60_000 + b"."
    memo = b"\x80\x02)r\xff\xff\xff\xff."
    for evil in (laughs, deep, memo, b"", b"garbage", b"\x80\x02.", b"\x80\x02t.", b"\x80\x02h\x00.", b"N."):
        with pytest.raises(ValueError, match=r"bad\.pt: "):
            unpacked(archive(evil), "bad.pt")


def test_archives_that_are_none():
    good = packed(np.arange(3))
    assert unpacked(good, "x").tolist() == [0, 1, 2]
    inner = zipfile.ZipFile(io.BytesIO(good)).read("archive/data.pkl")
    assert unpacked(archive(inner), "x").tolist() == [0, 0, 0]
    for data, message in [
        (b"", "not a zip"),
        (good[:100], "not a zip"),
        (archive(inner, zipfile.ZIP_DEFLATED), "compressed"),
        (archive(inner, **{"data/0": bytes(23)}), "23 bytes are not 3 numbers"),
        (archive(inner, byteorder=b"big"), "big-endian"),
        (archive(bytes(1 << 17)), "not an archive of torch.save"),
        (archive(inner.replace(b"LongStorage", b"EvilStorage")), "does not hold one vector"),
    ]:
        with pytest.raises(ValueError, match=message):
            unpacked(data, "bad.pt")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_mutated_statistics():
    data = packed(np.arange(20))
    opened = 0
    for i in range(1000):
        rng = random.Random(i)
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 255, rng.randrange(256)])
        changed = changed[: rng.choice([len(data)] * 3 + [rng.randrange(len(data))])]
        try:
            unpacked(bytes(changed), "fuzz")
            opened += 1
        except ValueError as error:
            assert str(error)
    # the pickle itself, under a checksum that fits
    inner = zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")
    for i in range(2000):
        rng = random.Random(i)
        changed = bytearray(inner)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            unpacked(archive(bytes(changed), **{"data/0": bytes(160)}), "fuzz")
            opened += 1
        except ValueError as error:
            assert str(error)
    assert 0 < opened < 2000
