"""The README says what the results say."""

import json
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_readme():
    files = sorted((ROOT / "benchmarks" / "results").glob("cpu_decode_*.json"))
    readme = (ROOT / "README.md").read_text()
    (named,) = [file for file in files if f"benchmarks/results/{file.stem}.md" in readme]
    results = json.loads(named.read_text())
    assert report.summary(results["rows"]) in readme
    assert (named.with_suffix(".md")).read_text().endswith(report.table(results["rows"]))


def test_a_summary_needs_no_exact_mode():
    row = {
        "shape": "smollm2",
        "type": "q8_0",
        "threads": 2,
        "sparsity": 0.0,
        "ratios": {"dense/llama.cpp": 1.5},
        "byte_bound": 1.0,
        "systems": {"llama.cpp": {"tok_s": 10.0}, "dense": {"tok_s": 15.0}},
    }
    lines = report.summary([row, row | {"threads": 1}]).splitlines()
    assert lines[2:] == ["| SmolLM2-135M | Q8_0 | 0% | 10 | 15 | - | 1.50 | - | - |"]


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_other_sparsities_are_left_out(share):
    row = {"shape": "1b", "type": "q8_0", "threads": 2, "sparsity": share}
    assert len(report.summary([row]).splitlines()) == 2
