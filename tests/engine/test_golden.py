"""One golden, many engines: the numpy engine and every instruction set give the same greedy answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import golden

try:
    from prosparse import _core

    ISAS = _core.isas()
except ImportError:
    ISAS = []

ENGINES = ["naive", *ISAS]


def answers(engine: str, *model: str) -> dict[str, object]:
    backend = "naive" if engine == "naive" else "cpu"
    environment = os.environ | ({} if engine == "naive" else {"PROSPARSE_ISA": engine})
    command = [sys.executable, golden.__file__, backend, *model]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def expected(file: str) -> dict[str, object]:
    return json.loads((golden.FOLDER / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("engine", ENGINES)
def test_tiny_models(engine):
    found = answers(engine)
    for name, answer in expected("tiny.json").items():
        assert found[name] == answer, name


@pytest.mark.parametrize("engine", ENGINES)
def test_smollm2(engine, smollm2_path: Path):
    assert answers(engine, str(smollm2_path)) == expected("smollm2.json")
