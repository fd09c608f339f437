"""The verb `sparsify` from text and a model to a folder that the engine runs."""

import json

import numpy as np
import pytest

from prosparse import cli
from prosparse.formats import open_model
from prosparse.formats.hf import write_folder

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


@pytest.fixture
def folders(tmp_path, tiny_model):
    write_folder(tmp_path / "tiny", tiny_model(intermediate=256), "F32")
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * 5}] * 40
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(folders, *more: str) -> list[str]:
    options = {"-m": folders / "tiny", "--data": folders / "data.jsonl", "--out": folders / "out"}
    sizes = ["--context", "32", "--batch-tokens", "128", "--tokens", "10240", "--micro", "4", "--lr", "3e-3"]
    flat = [str(part) for pair in options.items() for part in pair]
    return ["sparsify", *flat, *sizes, "--device", "cpu", "--workers", "1", "--json", *more]


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
