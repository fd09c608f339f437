"""The pull to the original's weights: its step, what it leaves alone, and what it does to a run."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from test_trainer import config, trainer  # noqa: E402

from prosparse.cli import main  # noqa: E402
from prosparse.formats.hf import write_folder  # noqa: E402
from prosparse.model.adapter import parse_levels, parse_ranks  # noqa: E402
from prosparse.model.model import Tensor  # noqa: E402
from prosparse.sparsify import coded, hf_model, lora  # noqa: E402
from prosparse.sparsify.losses import LossMix  # noqa: E402
from prosparse.sparsify.pull import Pull  # noqa: E402


def moved(model, by: float = 0.1):
    """The same model with other matrices."""
    tensors = dict(model.tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            values = torch.from_numpy(tensor.dequantize()) + by
            tensors[name] = Tensor("F32", tensor.shape, values.contiguous().view(torch.uint8).numpy())
    return replace(model, tensors=tensors)


def test_a_step_goes_a_share_of_the_way(tiny_model):
    original = tiny_model()
    student, teacher = hf_model.load(moved(original)), hf_model.load(original)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    pull = Pull(student, teacher, lambda name: 25.0 if ".q_proj." in name else 50.0)
    pull.step(4e-3)
    theirs = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        is_layers = p.ndim == 2 and ".layers." in name
        share = 0.1 if ".q_proj." in name else 0.2
        expected = before[name].lerp(theirs[name], share) if is_layers else before[name]
        torch.testing.assert_close(p, expected, msg=name)
    pull.step(1.0)  # never past it
    for name, p in student.named_parameters():
        if p.ndim == 2 and ".layers." in name:
            assert torch.equal(p, theirs[name])


def test_coded_changes_shrink(tiny_model):
    original = tiny_model(tied=True)
    student, teacher = hf_model.load(original), hf_model.load(original)
    coded.add(student, parse_levels("3:2"), moved(original))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    Pull(student, teacher, lambda _: 1.0).step(0.25)
    changes = 0
    for name, p in student.named_parameters():
        shrinks = p.ndim == 2 and p.requires_grad
        changes += shrinks
        torch.testing.assert_close(p.detach(), before[name] * 0.75 if shrinks else before[name], msg=name)
    assert changes == 7 * len(student.mlps)


def test_what_adapters_add_has_no_original(tiny_model):
    student = hf_model.load(tiny_model())
    lora.add(student, parse_ranks("4"))
    with pytest.raises(ValueError, match="--lora"):
        Pull(student, hf_model.load(tiny_model()), lambda _: 1.0)


def test_a_run_stays_nearer(tiny_model, mixture, tmp_path):
    model = tiny_model()
    theirs = dict(hf_model.load(model).named_parameters())
    distance = {}
    for pull in (0.0, 30.0, 1e6):
        run = trainer(model, mixture, config(20, pull=pull), tmp_path / str(pull), "relu")
        run.run()
        distance[pull] = sum(
            (p - theirs[name]).square().sum().item()
            for name, p in run.student.named_parameters()
            if p.ndim == 2 and ".layers." in name
        )
    assert 0 == distance[1e6] < distance[30.0] < 0.5 * distance[0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pull", "-1"], "must not be negative"),
        (["--pull", "1", "--lora", "4"], "--pull is for all weights"),
    ],
)
def test_pulls_that_cannot_be(tiny_model, tmp_path, capsys, options, said):
    with pytest.raises(ValueError, match="must not be negative"):
        config(pull=-1.0)
    with pytest.raises(ValueError, match="needs distillation"):
        config(pull=1.0, mix=LossMix(next_token=1.0, distil=0.0))
    write_folder(tmp_path / "m", tiny_model(), "F32")
    (tmp_path / "text.jsonl").write_text('{"text": "the quick brown fox"}\n' * 100)
    command = ["sparsify", "-m", tmp_path / "m", "--data", tmp_path / "text.jsonl", "--out", tmp_path / "run"]
    assert main([str(part) for part in (*command, *options, "--device", "cpu")]) == 2
    assert said in capsys.readouterr().err
