"""Training end to end on a tiny model: it gets where it should, and resumes as if nothing had happened."""

import json
from dataclasses import replace

import numpy as np
import pytest

from prosparse.model.activation import Activation
from prosparse.model.model import Model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from prosparse.sparsify import checkpoint, hf_model  # noqa: E402
from prosparse.sparsify.batches import Mixture  # noqa: E402
from prosparse.sparsify.config import TrainConfig  # noqa: E402
from prosparse.sparsify.controller import TargetControl  # noqa: E402
from prosparse.sparsify.distributed import World  # noqa: E402
from prosparse.sparsify.losses import LossMix  # noqa: E402
from prosparse.sparsify.schedule import LambdaSchedule, LearningRate  # noqa: E402
from prosparse.sparsify.trainer import Feed, Trainer  # noqa: E402

CONTEXT = 32  # of `mixture`


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_activation(model: Model, activation: Activation) -> Model:
    return replace(model, config=replace(model.config, activation=activation))


def config(steps: int = 12, **changes) -> TrainConfig:
    values = {
        "steps": steps,
        "micro_sequences": 2,
        "learning_rate": LearningRate("constant", 3e-3, steps),
        "checkpoint_every": 5,
    }
    return TrainConfig(**values | changes)


def trainer(
    model: Model, mixture: Mixture, config: TrainConfig, folder, activation: str = "fatrelu"
) -> Trainer:
    student = hf_model.load(with_activation(model, Activation(activation, 0.0)))
    teacher = hf_model.load(model) if config.mix.distil else None
    return Trainer(student, teacher, [Feed(mixture, 4, config.steps)], config, folder)


def lines(folder) -> list[dict]:
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        del line["seconds"]
    return metrics


def test_the_loaded_model_is_the_model(tiny_model):
    from prosparse.engine.engine import LLM

    for options in ({}, {"architecture": "qwen3", "qk_norm": True, "head_dim": 32}, {"act": "fatrelu_0.3"}):
        model = tiny_model(**options)
        trunk = hf_model.load(model)
        tokens = np.arange(40) % 288
        with torch.no_grad():
            logits = trunk.hidden(torch.from_numpy(tokens)[None])[0] @ trunk.head.T
        expected = LLM(model, backend="naive").forward(tokens, all_logits=True)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-3, atol=2e-4)


def test_distillation_learns(tiny_model, mixture, tmp_path):
    run = trainer(tiny_model(), mixture, config(40), tmp_path, "relu")
    run.run()
    metrics = lines(tmp_path)
    assert [line["step"] for line in metrics] == list(range(1, 41))
    kl = [line["kl"] for line in metrics]
    assert np.mean(kl[-5:]) < 0.8 * np.mean(kl[:5])
    assert metrics[-1]["tokens"] == 40 * 4 * CONTEXT


@pytest.mark.parametrize("target", [0.7, 0.9])
def test_a_target_is_reached(tiny_model, mixture, tmp_path, target):
    control = TargetControl(target, start=0.1, end=0.6)
    run = trainer(tiny_model(intermediate=256), mixture, config(120, control=control), tmp_path)
    run.run()
    last = lines(tmp_path)[-20:]
    assert np.mean([line["sparsity"] for line in last]) == pytest.approx(target, abs=0.02)
    assert last[-1]["wanted"] == pytest.approx(target)


def test_the_schedule_of_lambda_is_followed(tiny_model, mixture, tmp_path):
    schedule = LambdaSchedule.progressive(3, (0.01, 0.5), (6, 12))
    run = trainer(tiny_model(), mixture, config(schedule=schedule), tmp_path, "relu")
    run.run()
    assert [line["lambda"] for line in lines(tmp_path)] == [schedule.at(step) for step in range(1, 13)]


def test_matrices_may_learn_slower(tiny_model, mixture, tmp_path):
    run = trainer(tiny_model(), mixture, config(1, matrix_rate=1e-6, clip=1e9), tmp_path, "relu")
    before = {name: p.detach().clone() for name, p in run.student.model.named_parameters()}
    run.run()
    for name, parameter in run.student.model.named_parameters():
        moved = (parameter - before[name]).abs().max().item()
        assert moved < 1e-7 if parameter.ndim == 2 else moved > 1e-3, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_attention_may_learn_slower(tiny_model, mixture, tmp_path, optimizer):
    run = trainer(
        tiny_model(), mixture, config(1, attention_rate=1e-6, optimizer=optimizer), tmp_path, "relu"
    )
    before = {name: p.detach().clone() for name, p in run.student.named_parameters()}
    run.run()
    for name, parameter in run.student.named_parameters():
        moved = (parameter - before[name]).abs().max()
        slow = parameter.ndim == 2 and ".self_attn." in name
        assert (0 < moved < 1e-7) if slow else moved > 1e-5, name


def test_sparsity_is_that_of_text_without_noise(tiny_model, mixture, tmp_path):
    whole = mixture.batch(0, 4)
    student = hf_model.load(with_activation(tiny_model(), Activation("relu")))
    zeros = []
    for mlp in student.mlps:
        mlp.observe = lambda x1: zeros.append((x1 == 0).float().mean().item())
    with torch.no_grad():
        student(torch.from_numpy(whole.tokens[::2, :-1]))
    noisy = Mixture(mixture._stores, [1.0], context=CONTEXT, seed=0, vocab_size=288, noise=0.9)
    assert (noisy.batch(0, 4).tokens != whole.tokens).any(axis=1).tolist() == [False, True] * 2
    trainer(tiny_model(), noisy, config(1, noise=0.9), tmp_path, "relu").run()
    assert lines(tmp_path)[0]["sparsity"] == pytest.approx(np.mean(zeros), abs=1e-6)
    with pytest.raises(ValueError, match="the data has noise"):
        trainer(tiny_model(), noisy, config(1), tmp_path, "relu")
    for wrong, match in [({"micro_sequences": 1}, "even number"), ({"mix": LossMix(1.0)}, "next-token")]:
        with pytest.raises(ValueError, match=match):
            config(noise=0.1, **wrong)


def test_l1_lowers_x1(tiny_model, mixture, tmp_path):
    sums = {}
    for factor in (0.0, 2.0):
        schedule = LambdaSchedule.constant(1, factor, 30)
        run = trainer(tiny_model(), mixture, config(30, schedule=schedule), tmp_path / str(factor), "relu")
        run.run()
        sums[factor] = sum(measure.l1.item() for measure in run._lessons._measures)
    assert sums[2.0] < 0.7 * sums[0.0]


def test_recomputing_changes_nothing(tiny_model, mixture, tmp_path):
    control = TargetControl(0.8, start=0.2, end=0.8)
    for recompute in (False, True):
        folder = tmp_path / str(recompute)
        trainer(tiny_model(), mixture, config(control=control, recompute=recompute), folder).run()
    assert lines(tmp_path / "True") == lines(tmp_path / "False")


@pytest.mark.parametrize("stop", [1, 5, 7, 11])
def test_a_broken_run_goes_on_as_if_unbroken(tiny_model, mixture, tmp_path, stop):
    control = TargetControl(0.8, start=0.2, end=0.8)
    whole = trainer(tiny_model(), mixture, config(control=control), tmp_path / "whole")
    whole.run()

    class Killed(BaseException):
        pass

    def kill(metrics):
        if metrics["step"] == stop:
            raise Killed

    with pytest.raises(Killed):
        trainer(tiny_model(), mixture, config(control=control), tmp_path / "broken").run(kill)
    again = trainer(tiny_model(), mixture, config(control=control), tmp_path / "broken")
    assert again.step == stop // 5 * 5 if stop % 5 else again.step in (0, stop - 5)
    again.run()
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    state, broken = whole.student.model.state_dict(), again.student.model.state_dict()
    assert all(torch.equal(state[name], broken[name]) for name in state)


def test_half_written_checkpoints_are_not_seen(tiny_model, mixture, tmp_path):
    trainer(tiny_model(), mixture, config(5), tmp_path).run()
    folder = tmp_path / "checkpoints"
    half = folder / ".step-00000099.part"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"cut off")
    assert checkpoint.latest(folder, World()).name == "step-00000005"
    assert not half.exists()


def test_steps_that_are_not_finite_are_skipped_then_stop_the_run(tiny_model, mixture, tmp_path):
    run = trainer(tiny_model(), mixture, config(max_bad_steps=3), tmp_path)
    before = run.student.head.detach().clone()
    run.student.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="3 steps in a row"):
        run.run()
    assert torch.equal(run.student.head, before)
    assert [line["skipped"] for line in map(json.loads, (tmp_path / "metrics.jsonl").open())] == [True, True]


def test_documents_do_not_see_each_other(tiny_model):
    trunk = hf_model.load(tiny_model())
    tokens = torch.arange(20)[None]
    document = (torch.arange(20)[None] >= 8).int()
    with torch.no_grad():
        masked = trunk.hidden(tokens, document)
        alone = trunk.hidden(tokens[:, 8:])
        first = trunk.hidden(tokens[:, :8])
    torch.testing.assert_close(masked[:, 8:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked[:, :8], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_trained_runs_in_the_engine(tiny_model, mixture, tmp_path, tied):
    """Thresholds that differ by layer end as one; the logits stay."""
    from prosparse.engine.engine import LLM

    original = tiny_model(tied=tied)
    control = TargetControl(0.8, start=0.1, end=0.5)
    run = trainer(original, mixture, config(20, control=control), tmp_path)
    run.run()
    model = hf_model.to_model(run.student, original)
    assert model.config.activation.name == "fatrelu"
    assert len({float(mlp.threshold) for mlp in run.student.mlps}) == 2
    tokens = np.arange(97, 123)
    with torch.no_grad():
        expected = (run.student.hidden(torch.from_numpy(tokens)[None])[0] @ run.student.head.T).numpy()
    got = LLM(model, backend="naive").forward(tokens, all_logits=True)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)
    assert hf_model.to_model(run.student, original, "BF16").tensors["model.norm.weight"].type == "F32"


def test_bad_configurations(tiny_model, mixture, tmp_path):
    for changes, match in [
        ({"steps": 0}, "steps"),
        ({"schedule": LambdaSchedule.constant(1, 0.1, 2), "control": TargetControl(0.9)}, "not both"),
    ]:
        with pytest.raises(ValueError, match=match):
            config(**{"steps": 12} | changes) if "steps" in changes else config(**changes)
    student = hf_model.load(tiny_model())
    feeds = [Feed(mixture, 4, 12)]
    with pytest.raises(ValueError, match="original"):
        Trainer(student, None, feeds, config(), tmp_path)
    text_only = config(mix=LossMix(1.0, 0.0))
    for wrong, match in [
        ([Feed(mixture, 3, 12)], "multiple"),
        ([Feed(mixture, 4, 11)], "rise"),
        ([], "rise"),
    ]:
        with pytest.raises(ValueError, match=match):
            Trainer(student, None, wrong, text_only, tmp_path)
    Trainer(student, None, feeds, text_only, tmp_path)


def test_a_full_disk_loses_nothing(tiny_model, mixture, tmp_path):
    """The error is the disk's own, the checkpoint before stays, and the run goes on from it."""
    resource = pytest.importorskip("resource")
    whole = trainer(tiny_model(), mixture, config(), tmp_path / "whole")
    whole.run()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(metrics):
        if metrics["step"] == 9:  # one checkpoint is there, the next does not fit
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    folder = tmp_path / "full"
    try:
        with pytest.raises(OSError, match="Is the disk full"):
            trainer(tiny_model(), mixture, config(), folder).run(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000005"]
    again = trainer(tiny_model(), mixture, config(), folder)
    assert again.step == 5
    again.run()
    assert lines(folder) == lines(tmp_path / "whole")
