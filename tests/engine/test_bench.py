"""Verb bench: rows, JSON, and arguments that make no sense."""

import json

import pytest

from prosparse.cli import main
from prosparse.engine.bench import bench, sample_tokens


def test_json_line(smollm2_path, capsys):
    assert main(["bench", "-m", str(smollm2_path), "-p", "8", "-n", "4", "-r", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["mode"], row["test"]): row for row in result["rows"]}
    assert set(rows) == {("dense", "pp8"), ("dense", "tg4")}
    decode = rows["dense", "tg4"]
    assert decode["tok_s"] > 0
    # the file has 96.6 MB of weights; the engine's layout may take a little more
    assert 0.0966 <= decode["gb_s"] / decode["tok_s"] < 0.115
    assert "gb_s" not in rows["dense", "pp8"]


def test_both_modes_of_a_sparse_model(sparse_path):
    rows = bench(str(sparse_path), n_prompt=0, n_gen=8, repetitions=1)["rows"]
    assert [(row["mode"], row["test"]) for row in rows] == [("exact", "tg8"), ("dense", "tg8")]
    assert all(0.8 < row["sparsity"] < 0.97 for row in rows)


@pytest.mark.parametrize("options", [{"n_prompt": -1}, {"n_prompt": 0, "n_gen": 0}, {"repetitions": 0}])
def test_nothing_to_measure(options):
    with pytest.raises(ValueError, match="must"):
        bench("demo", **options)


def test_sample_tokens_repeat():
    class Letters:
        def encode(self, text, add_bos):
            return list(text[:5])

    assert sample_tokens(Letters(), 12) == list("The lThe lTh")
