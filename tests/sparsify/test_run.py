"""The verb `sparsify` from text and a model to a folder that the engine runs."""

import json

import numpy as np
import pytest
from command import arguments

from prosparse import cli
from prosparse.formats import open_model

CARD = """\
stage       lambda     steps  tokens, billions
relu             0    10,000             49.15
warmup       0.001    15,000             73.73
stage 2      0.005    20,000             98.30
stage 3      0.005    25,000            122.88
stage 4       0.05    35,000            172.03
decay         0.05    95,000            466.94
sft           0.01   101,000            473.02
"""


def test_the_stage_table_of_the_card(capsys):
    assert cli.main(["sparsify", "--preset", "minicpm-s-1b", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(CARD)
    chart = out.removeprefix(CARD).splitlines()
    assert chart[1].split("│")[0].strip() == "0.05"
    assert chart[-1].endswith("101,000")


def test_from_text_to_a_sparse_model(folders, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from prosparse.engine.engine import LLM

    assert cli.main(arguments(folders, "--target", "0.8", "--type", "f32")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == 80
    assert result["sparsity"] == pytest.approx(0.8, abs=0.03)
    model = open_model(result["model"])
    assert (model.config.activation.name, model.config.activation.param) == (
        result["hidden_act"],
        pytest.approx(result["hidden_act_param"]),
    )
    llm = LLM(model, backend="naive")
    llm.forward(np.array(llm.tokenizer.encode("the quick brown fox jumps over the lazy dog")))
    stats = llm.stats()
    assert stats["prefill_active"] / stats["prefill_neurons"] == pytest.approx(0.2, abs=0.06)
    training = json.loads((folders / "out" / "training.json").read_text())
    assert training["config"]["steps"] == 80
    assert (folders / "out" / "metrics.png").stat().st_size > 10_000
    # a run that has ended is not trained again
    assert cli.main(arguments(folders, "--target", "0.8", "--type", "f32")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "minicpm-s-1b"], "give --sft-data"),
        (
            ["--preset", "minicpm-s-1b", "--sft-data", "x"],
            "is for 52 layers of width 1536; this model has 2 of 96",
        ),
        (["--sft-data", "x"], "for presets with such a stage"),
        (["--self-data", "many"], "N or N:WEIGHT"),
        (["--self-prompts", "0.5"], "--self-prompts is for --self-data"),
        (["--self-prompts", "2", "--self-data", "4000"], "0 to 1"),
        (["--noise", "0.1", "--next-token", "0.5"], "noise is for distillation"),
        (["--noise", "1"], "noise"),
        (["--noise", "0.1", "--micro", "1"], "even number"),
        (["--attention-rate", "0"], "attention"),
        (["--log", "paper"], "unknown logger 'paper'"),
        (["--lora", "0"], "at least 1"),
        (["--preset", "nothing"], "unknown preset 'nothing'"),
        (["--target", "1.5"], "between 0 and 1"),
        (["--data", "nowhere.jsonl"], "does not exist"),
        (["--dry-run"], "--preset"),
        (["--context", "100000", "--batch-tokens", "100000"], "smaller context"),
    ],
)
def test_mistakes_are_told_before_anything_slow(folders, capsys, options, message):
    pytest.importorskip("torch")
    assert cli.main(arguments(folders, *options)) == 2
    assert message in capsys.readouterr().err


def test_a_step_keeps_its_size(folders):
    pytest.importorskip("torch")
    import argparse

    from prosparse.sparsify import run, settings

    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = ["--context", "32", "--batch-tokens", "384", "--micro", "8"]
    args = parser.parse_args([*options, "--data", "x"])
    reads = settings.readings(args, None)
    assert reads[0].sequences == 12
    for processes, micro in [(1, 6), (2, 6), (3, 4), (4, 3), (12, 1)]:
        config = settings.train_config(args, None, reads, bfloat16=False, processes=processes)
        assert config.micro_sequences == micro
    with pytest.raises(ValueError, match="shared evenly by 5"):
        settings.train_config(args, None, reads, bfloat16=False, processes=5)


def test_everything_must_be_given(capsys):
    assert cli.main(["sparsify"]) == 2
    assert "-m" in capsys.readouterr().err


def test_everything_at_once(folders, capsys):
    """Adapters, self-generated text, mixed losses, a trained control, TensorBoard, saved memory."""
    for package in ("torch", "transformers", "peft", "tensorboard", "matplotlib"):
        pytest.importorskip(package)
    options = "--self-data 4000:0.5 --self-prompts 0.5 --lora 4 --next-token 0.5 --distil 0.5"
    options += " --temperature 2 --top-k 20 --control --document-mask --recompute --log tensorboard"
    options += " --tokens 2560 --type f32"
    assert cli.main(arguments(folders, *options.split())) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert "step 20/20" in err
    run = folders / "out"
    report = json.loads((run / "report.json").read_text())
    assert result["report"] == report
    sources = [row["source"] for row in report["rows"]]
    assert sources[0] == str(folders / "data.jsonl")
    assert sources[1].startswith("tiny ") and sources[1].endswith("its own text")
    for row in report["rows"]:
        assert row["control"] not in (None, row["original"], row["sparse"])
        assert row["sparsity"] == pytest.approx(0.9, abs=0.08)
        assert len(row["layers"]) == 2
    assert (run / "layers.png").stat().st_size > 5_000
    assert list((run / "tensorboard").iterdir())
    assert len((run / "control" / "metrics.jsonl").read_text().splitlines()) == 20
    assert open_model(run / "control" / "model").config.activation.name == "silu"
    trained, given = open_model(run / "model"), open_model(folders / "tiny")
    assert trained.tensors.keys() == given.tensors.keys()
    moved = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(trained.tensors[moved].data, given.tensors[moved].data)
    embedding = "model.embed_tokens.weight"
    np.testing.assert_array_equal(trained.tensors[embedding].data, given.tensors[embedding].data)


def test_a_run_is_not_gone_on_with_by_other_options(folders, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert cli.main(arguments(folders, "--tokens", "640")) == 0
    assert cli.main(arguments(folders, "--tokens", "640", "--micro", "2")) == 0
    for other in (
        ["--tokens", "1280"],
        ["--tokens", "640", "--target", "0.7"],
        ["--tokens", "640", "--seed", "1"],
    ):
        assert cli.main(arguments(folders, *other)) == 2
        assert "holds a run with another" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_found_out_first(folders, capsys, monkeypatch):
    pytest.importorskip("torch")
    from types import SimpleNamespace

    from prosparse.sparsify import session

    monkeypatch.setattr(session.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert cli.main(arguments(folders)) == 2
    assert "GB of disk, 0.0 GB are free" in capsys.readouterr().err
    assert not (folders / "out" / "tokens").exists()


def test_phases_of_a_preset(folders, capsys, monkeypatch):
    """Text, then text and instructions, then instructions alone in smaller steps."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from prosparse.sparsify import presets
    from prosparse.sparsify.presets import Phase, Preset
    from prosparse.sparsify.schedule import LambdaSchedule, LearningRate

    small = Preset(
        "small",
        hidden_size=96,
        num_hidden_layers=2,
        schedule=LambdaSchedule.progressive(2, (1e-3, 5e-2), (4, 6), decay=(5e-2, 9), sft=(1e-2, 12)),
        learning_rate=LearningRate("wsd", 1e-3, 12, stable_until=6, half_life=2, decay_until=9),
        phases=(Phase("stable", 6, 128), Phase("decay", 9, 128), Phase("sft", 12, 64)),
        threshold=0.01,
    )
    monkeypatch.setitem(presets.PRESETS, "small", small)
    rows = [{"prompt": f"What is {i} plus {i}?", "response": f"It is {2 * i}. " * 8} for i in range(40)]
    (folders / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--context", "32", "--micro", "4", "--device", "cpu", "--workers", "1", "--preset", "small"]
    paths = ["-m", folders / "tiny", "--data", folders / "data.jsonl", "--sft-data", folders / "sft.jsonl"]
    command = ["sparsify", *map(str, paths), "--out", str(folders / "out"), *sizes]
    assert cli.main(command) == 0
    lines = [json.loads(line) for line in (folders / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [128 * min(i, 9) + 64 * max(i - 9, 0) for i in range(1, 13)]
    assert [line["lambda"] for line in lines] == [small.schedule.at(i) for i in range(1, 13)]
    assert lines[8]["lr"] == lines[11]["lr"] == pytest.approx(1e-3 * 0.5**1.5)
    assert small.tokens_until(12) == lines[-1]["tokens"]
