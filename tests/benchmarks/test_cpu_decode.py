"""The comparison end to end on a small file, without rivals that need an extra."""

import json

import pytest
from benchmarks.shapes import threshold, tiny, write

from benchmarks import cpu_decode, report


@pytest.fixture
def row(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_decode, "LlamaCpp", OursAsRival)
    write(tiny(), "q8_0", tmp_path / "m.gguf")
    activation = {"hidden_act": "fatrelu", "hidden_act_param": threshold(tiny(), "q8_0", 0.88)}
    case = cpu_decode.Case("tiny", "q8_0", tmp_path / "m.gguf", 0.88, activation, torch=False)
    monkeypatch.setattr(cpu_decode.Case, "tokens", lambda self, n: [3 + i % 300 for i in range(n)])
    args = cpu_decode.parse(["--threads", "1", "--rounds", "2", "-n", "16"])
    (row,) = cpu_decode.run_case(case, args)
    return row


class OursAsRival(cpu_decode.Prosparse):
    """Stands in for llama.cpp, which tests cannot expect to be installed."""

    def __init__(self, path, n_threads):
        super().__init__(path, n_threads, "dense")


def test_row(row):
    assert set(row["systems"]) == {"llama.cpp", "dense", "exact"}
    assert set(row["ratios"]) == {"dense/llama.cpp", "exact/llama.cpp", "exact/dense"}
    assert abs(row["sparsity"] - 0.88) < 0.02
    assert 1 < row["byte_bound"] < 3
    for system in row["systems"].values():
        assert system["tok_s"] > 0
        assert system["tok_s_p10"] >= system["tok_s"]


def test_report(row, tmp_path):
    results = {"machine": {"cpu": "a", "cores": 1, "isa": "b", "date": "c"}, "command": "d", "rows": [row]}
    report.save(results, tmp_path / "out")
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == [row]
    head, rule, line = (tmp_path / "out.md").read_text().split("\n\n")[1].splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert (tmp_path / "out.png").stat().st_size > 1000
