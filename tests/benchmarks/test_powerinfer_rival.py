"""The comparison with PowerInfer, whose part is played by a script that prints what its `main` prints."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks.powerinfer_main import PowerInfer, parse_timing
from benchmarks.relu_model import relu_model

from benchmarks import measure, powerinfer, shapes
from prosparse.engine.engine import LLM
from prosparse.formats import open_model
from prosparse.formats.convert import write_model
from prosparse.formats.powerinfer import prepare
from prosparse.model.predictor import Predictors
from tiny import make_tiny, stored

# llama_print_timings, as PowerInfer d3ebd7c has it
TIMINGS = """
llama_print_timings:        load time =     423.49 ms
llama_print_timings:      sample time =      30.95 ms /    64 runs   (    0.48 ms per token,  2067.92 tokens per second)
llama_print_timings: prompt eval time =       0.00 ms /     1 tokens (    0.00 ms per token,      inf tokens per second)
llama_print_timings:        eval time =    1680.00 ms /    64 runs   (   26.25 ms per token,    38.10 tokens per second)
llama_print_timings:       total time =    1800.00 ms
"""  # noqa: E501
FAKE = """#!{python} -S
import json, os, sys
options = dict(zip(sys.argv[1:-1], sys.argv[2:]))
with open({log!r}, "a") as log:
    entry = dict(argv=sys.argv[1:], cwd=os.getcwd(), omp=os.environ.get("OMP_NUM_THREADS"),
                 threshold=os.environ.get("LLAMA_SPARSE_PRED_THRESHOLD"))
    print(json.dumps(entry), file=log)
say = lambda line: print(line, file=sys.stderr)
n = int(options["-n"])
ms = 20.0 if "--no-mmap" in sys.argv else 10.0
say("main: build = 1569 (d3ebd7c)")
if open(options["-m"], "rb").read(4) != b"PWRI":
    say("error loading model: create_tensor: tensor 'blk.0.ffn_down.weight' not found")
    sys.exit(1)
say("llama_model_load: PowerInfer model loaded. Sparse inference will be used.")
say("llm_load_print_meta: sparse_pred_threshold = {threshold}")
say("system_info: n_threads = 2 / 2 | AVX = 1 | AVX2 = 1 | ")
{body}
print("some text \\xfe of its own")
say("")
say("llama_print_timings:        load time = %10.2f ms" % 423.49)
rate = "(%8.2f ms per token, %8.2f tokens per second)"
say("llama_print_timings: prompt eval time = %10.2f ms / %5d tokens " % (0, 1) + rate % (0, float("inf")))
say("llama_print_timings:        eval time = %10.2f ms / %5d runs   " % (ms * n, n) + rate % (ms, 1e3 / ms))
say("llama_print_timings:       total time = %10.2f ms" % (ms * n + 500))
say("Log end")
"""


class Fake:
    """A `main` in `folder`; `body` runs after it has loaded the file."""

    def __init__(self, folder, body="", threshold="1.00"):
        self.path, self._log = folder / "main", folder / "calls.jsonl"
        log = str(self._log)
        self.path.write_text(FAKE.format(python=sys.executable, log=log, body=body, threshold=threshold))
        self.path.chmod(0o755)

    @property
    def calls(self):
        calls = [SimpleNamespace(**json.loads(line)) for line in self._log.read_text().splitlines()]
        for call in calls:
            call.options = dict(zip(call.argv[:-1], call.argv[1:], strict=True))
        return calls


def with_predictors(model):
    """Any lowrank ones, of the threshold that `Fake` says it runs with."""
    rng = np.random.default_rng(1)
    c = model.config
    one = [rng.standard_normal(s, np.float32) for s in ((32, c.hidden_size), (c.intermediate_size, 32))]
    networks = (tuple(stored(values, "F32") for values in one),) * c.num_hidden_layers
    rows = ((1.0,),) * c.num_hidden_layers
    return replace(model, predictors=Predictors("lowrank", "residual", (0.9,), rows, 0.9, networks))


def small(act="relu", act_param=None, **options):
    """Room for `rivals.N_CTX`."""
    sizes = {"intermediate": 256, "max_position_embeddings": 1024}
    return with_predictors(make_tiny(act=act, act_param=act_param, **sizes, **options))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "m.pwri.gguf"
    prepare(small(), "F16").write(path)
    return path


def rival(file, main, **options):
    return PowerInfer(
        **{"path": file, "n_threads": 2, "main": main, "threshold": 1.0, "timeout": 20} | options
    )


def test_timings_are_parsed():
    timing = parse_timing(TIMINGS, 64)
    assert (timing.seconds, timing.tokens) == (1.68, 64)
    assert 1 / timing.per_token == pytest.approx(38.10, abs=0.01)
    assert parse_timing(TIMINGS, 65).tokens == 64


@pytest.mark.parametrize("n", [63, 66])
def test_another_number_of_tokens_is_refused(n):
    with pytest.raises(ValueError, match=rf"decoded 64 tokens in 1680 ms, not {n}"):
        parse_timing(TIMINGS, n)


def test_what_main_is_asked(file, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_SPARSE_PRED_THRESHOLD", "-1e9")
    fake = Fake(tmp_path)
    system = rival(file, fake.path)
    assert system.decode([1] * 600) == [pytest.approx(0.01)]
    assert [call.options["-n"] for call in fake.calls] == ["16", "16", "600"]
    # --no-mmap was tried, and is twice as slow here
    assert ["--no-mmap" in call.argv for call in fake.calls] == [False, True, False]
    call = fake.calls[-1]
    wanted = {"-m": str(file), "-t": "2", "-c": "600", "-p": "", "--temp": "0", "--repeat-penalty": "1.0"}
    assert wanted.items() <= call.options.items()
    assert "--ignore-eos" in call.argv
    assert (call.omp, call.threshold) == ("2", None)
    assert not os.path.exists(call.cwd)
    facts = system.facts()
    assert facts["build"] == "build = 1569 (d3ebd7c)"
    assert facts["system_info"].endswith("AVX2 = 1 |")


def test_the_faster_setting_is_kept(file, tmp_path):
    fake = Fake(tmp_path, "ms = 30.0 - ms")
    system = rival(file, fake.path)
    assert system.decode([1] * 32) == [pytest.approx(0.01)]
    assert system.facts()["settings"] == ["--no-mmap"]


def test_a_setting_that_fails_is_not_taken(file, tmp_path):
    fake = Fake(tmp_path, "if '--no-mmap' in sys.argv: sys.exit(1)")
    assert rival(file, fake.path).facts()["settings"] == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "say('cannot think'); sys.exit(3)",
            r"ended with code 3 on m\.pwri\.gguf\. Its last.*\n(.*\n)*  cannot",
        ),
        (
            "say('error loading model: basic_string: construction from null is not valid'); sys.exit(1)",
            r"\(a tensor is there that it does not ask for\)",
        ),
        ("say('key llama.x has wrong type: u32'); sys.exit(1)", r"another number type than it wants"),
        ("os.kill(os.getpid(), 6)", r"was ended by SIGABRT"),
        ("sys.exit(0)", r"without a line `llama_print_timings: eval time .* another version"),
        ("n = 5", r"decoded 5 tokens in 50 ms, not 16"),
        ("say('load: using CUDA for GPU acceleration')", r"a build for GPUs"),
    ],
)
def test_runs_that_fail(file, tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        rival(file, Fake(tmp_path, body).path)


def test_a_run_that_does_not_end(file, tmp_path):
    with pytest.raises(ValueError, match=r"not done after 0\.3 s: .*-n.*--timeout"):
        rival(file, Fake(tmp_path, "import time; time.sleep(30)").path, timeout=0.3)


def test_a_dense_file_is_refused_with_the_trap(file, tmp_path):
    data = file.read_bytes()
    file.write_bytes(b"GGUF" + data[4:])
    with pytest.raises(ValueError, match=r"the magic is GGUF.*: PWRI is needed"):
        rival(file, Fake(tmp_path).path)


def test_another_threshold_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match=r"runs with the threshold 1\.00, the file has 0\.50"):
        rival(file, Fake(tmp_path).path, threshold=0.5)


def test_a_program_that_is_not_powerinfer(file, tmp_path):
    fake = tmp_path / "main"
    fake.write_text("#!/bin/sh\necho something else\n")
    with pytest.raises(ValueError, match="not executable"):
        rival(file, fake)
    with pytest.raises(ValueError, match="not executable"):
        rival(file, tmp_path)
    fake.chmod(0o755)
    with pytest.raises(ValueError, match=r"Sparse inference will be used(.*\n)*  something else"):
        rival(file, fake)
    fake.write_bytes(b"\x7fELF")
    with pytest.raises(ValueError, match="cannot be started"):
        rival(file, fake)
    with pytest.raises(ValueError, match=r"there is no .*/nothing"):
        rival(file, tmp_path / "nothing")


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """No turn is repeated, bandwidth is not measured, and files go to `tmp_path`."""
    monkeypatch.setattr(powerinfer.Engine, "bandwidth", lambda self, n_threads: 10.0)
    monkeypatch.setattr(measure, "_busy_seconds", lambda: 0.0)
    monkeypatch.setattr(shapes, "CACHE", tmp_path / "cache")


class Here:
    """`rivals.Process` without a process."""

    pid = os.getpid()

    def __init__(self, runner, **arguments):
        self._runner = runner(**arguments)

    def call(self, method, *arguments):
        return getattr(self._runner, method)(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_the_comparison(quiet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(powerinfer, "Process", Here)
    write_model(tmp_path / "m.gguf", small("fatrelu", 0.01))
    fake, out = Fake(tmp_path), tmp_path / "out.json"
    powerinfer.main(
        f"--main {fake.path} -m {tmp_path / 'm.gguf'} --as-relu --types f16,q4_0 -t 1 -n 12 --rounds 2 "
        f"--out {out}".split()
    )
    printed = capsys.readouterr()
    assert printed.err.count("PowerInfer runs this file as relu") == 2
    assert printed.out.count("target 1.5: ") == 6
    results = json.loads(out.read_text())
    rows = {row["type"]: row for row in results["rows"]}
    assert list(rows) == ["f16", "q4_0"]
    assert str(tmp_path) not in results["command"]
    for row in rows.values():
        theirs = row["systems"].pop("PowerInfer")
        assert theirs["round_ms"] == [pytest.approx(10.0)] * 2
        assert theirs["tok_s"] == pytest.approx(100.0)
        assert set(row["systems"]) == {"dense", "exact", "predicted"}
        for name, ours in row["systems"].items():
            ratio = np.median([10.0 / ms for ms in ours["round_ms"]])
            assert row["ratios"][f"{name}/PowerInfer"] == pytest.approx(ratio)
            bound = theirs["mb_per_token"] / ours["mb_per_token"]
            assert row["byte_ratios"][f"{name}/PowerInfer"] == pytest.approx(bound)
        assert 0.3 < row["sparsity"] < 0.7
        assert row["systems"]["predicted"]["candidates"] == pytest.approx(1 - row["predicted_sparsity"])
    last = json.loads(printed.out.splitlines()[-1])
    assert last["ratios"]["f16"] == rows["f16"]["ratios"]
    # two trials and two rounds a type, and nothing is left
    assert [call.options["-n"] for call in fake.calls] == ["16", "16", "12", "12"] * 2
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_model_one_is_made(quiet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(powerinfer, "Process", Here)
    monkeypatch.setattr(shapes, "minicpm_1b", shapes.tiny)
    given = [
        "--main",
        str(Fake(tmp_path, threshold="0.00").path),
        "--layers",
        "2",
        "-t",
        "1",
        "--rounds",
        "1",
    ]
    powerinfer.main([*given, "--types", "q4_0", "-n", "64"])
    assert "random-tiny q4_0 -t 1" in capsys.readouterr().out
    monkeypatch.setattr(powerinfer, "relu_model", lambda shape, *_: relu_model(shape, 0.7, 0.6))
    with pytest.raises(RuntimeError, match=r"inactive and .* not 0\.88 and 0\.8"):
        powerinfer.main([*given, "--types", "f16", "-n", "64"])


def test_an_error_comes_from_the_rivals_process(quiet, tmp_path):
    write_model(tmp_path / "m.gguf", small())
    fake = Fake(tmp_path, "sys.exit(1)")
    with pytest.raises(SystemExit, match=r"error: .* ended with code 1 on f16\.pwri\.gguf"):
        powerinfer.main(["--main", str(fake.path), "-m", str(tmp_path / "m.gguf")])
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: small("fatrelu", 0.01), "no FATReLU: --as-relu"),
        (lambda: replace(small(), predictors=None), "`prosparse predict`"),
        (make_tiny, "computes relu"),
    ],
)
def test_models_that_powerinfer_cannot_run(quiet, tmp_path, model, message):
    write_model(tmp_path / "m.gguf", model())
    with pytest.raises(SystemExit, match=message):
        powerinfer.main(["--main", str(Fake(tmp_path).path), "-m", str(tmp_path / "m.gguf")])


def test_no_binary_no_work(quiet, tmp_path):
    with pytest.raises(SystemExit, match="error: there is no"):
        powerinfer.main(["--main", str(tmp_path / "main")])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "given", ["--types q5_1", "-n 1", "-n 4000", "-t 0", "--predicted 0.9", "--rounds 0"]
)
def test_options(given):
    with pytest.raises(SystemExit, match="2"):
        powerinfer.parse(["--main", "main", *given.split()])


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_the_made_model(quiet, tmp_path, kind):
    """Shares as asked, predictors that miss nothing but what 4 bits blur, and other tokens at every step."""
    path = tmp_path / "m.gguf"
    prepare(relu_model(shapes.tiny(), 0.88, 0.80), kind).write(path)
    model = open_model(path)
    shares, tokens = {}, None
    for mode in ("predicted", "exact"):
        engine = powerinfer.Engine(path, 1, mode)
        tokens = tokens or engine.greedy(64)
        engine.decode(tokens)
        shares[mode] = engine.facts()
    assert len(set(tokens)) == 64
    assert not {*tokens} & {*model.config.eos_token_ids}
    assert shares["exact"]["sparsity"] == pytest.approx(0.88, abs=0.02)
    assert 1 - shares["predicted"]["candidates"] == pytest.approx(0.80, abs=0.02)
    recall = shares["predicted"]["active"] / shares["exact"]["active"]
    assert recall == pytest.approx(1, abs=1e-3 if kind == "F16" else 0.03)
    assert LLM(model, mode="dense").mode_reason.startswith("dense")


def test_what_powerinfer_reads():
    file = prepare(small(tied=True), "Q4_0")
    sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    read = powerinfer.Bytes.of(file.tensors)
    embedding = sizes["token_embd.weight"]
    row = embedding // 288
    assert read.per_token(1, 1) == sum(sizes.values()) - embedding + row
    neurons = 96 // 32 * 18  # bytes of one row of a matrix
    assert read.per_token(1, 1) - read.per_token(0.5, 1) == 2 * 2 * 128 * neurons
    assert read.per_token(1, 1) - read.per_token(1, 0.5) == 2 * 128 * neurons


def test_programs_that_a_process_ran_are_its_own():
    before = measure._own_seconds([os.getpid()])
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    assert measure._own_seconds([os.getpid()]) - before > 0.15
