"""lambda and the learning rate against points worked out by hand, and the published tables."""

import pytest

from prosparse.sparsify.presets import ABLATIONS, PRESETS, by_name
from prosparse.sparsify.schedule import LambdaSchedule, LearningRate, Stage

# from the tables and the sine of Algorithm 1: a stage's middle is its mean, a quarter is (1 - sqrt(1/2)) / 2
QUARTER = 0.14644660940672627
POINTS = {
    "prosparse-llama2-7b": {
        1: 0.0,
        5000: 0.0,
        5001: 5e-3,
        6000: 5e-3,
        7000: 5e-3 + QUARTER * 4.5e-2,
        8000: (5e-3 + 5e-2) / 2,
        10000: 5e-2,
        11000: 5e-2,
        13000: 5e-2 + QUARTER * 1.5e-1,
        14000: 1.25e-1,
        16000: 2e-1,
        16500: 2e-1,
        20000: 2e-1,
    },
    "prosparse-llama2-13b": {
        5500: 0.0,
        5501: 5e-3,
        6750: 5e-3,
        7750: 5e-3 + QUARTER * 5e-3,
        8750: 7.5e-3,
        10750: 1e-2,
        10875: 1e-2,
        13000: 1.5e-2,
        15000: 2e-2,
        16000: 2e-2,
    },
    "minicpm-s-1b": {
        10000: 0.0,
        10001: 1e-3,
        15000: 1e-3,
        17500: 3e-3,
        20000: 5e-3,
        22000: 5e-3,
        27500: 5e-3 + QUARTER * 4.5e-2,
        30000: 2.75e-2,
        35000: 5e-2,
        35001: 5e-2,
        95000: 5e-2,
        95001: 1e-2,
        101000: 1e-2,
    },
}
# accumulated tokens in billions, as printed in Tables 6 and 7 and on the card
TOKENS = {
    "prosparse-llama2-7b": [10.49, 12.58, 20.97, 25.17, 33.55, 34.60],
    "prosparse-llama2-13b": [46.14, 56.62, 90.18, 92.27, 125.83, 134.22],
    "minicpm-s-1b": [49.15, 73.73, 98.30, 122.88, 172.03, 466.94, 473.02],
}


@pytest.mark.parametrize("name", PRESETS)
def test_lambda_of_the_published_tables(name):
    schedule = by_name(name).schedule
    for step, factor in POINTS[name].items():
        assert schedule.at(step) == pytest.approx(factor, rel=1e-12), step


@pytest.mark.parametrize("name", PRESETS)
def test_tokens_of_the_published_tables(name):
    assert [round(tokens, 2) for *_, tokens in by_name(name).table()] == TOKENS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_lambda_never_jumps_within_the_rise(name):
    schedule = by_name(name).schedule
    rising = [stage for stage in schedule.stages if stage.shape == "sine"]
    steps = range(rising[0].until - 3000, rising[-1].until)
    jumps = [schedule.at(step + 1) - schedule.at(step) for step in steps]
    assert min(jumps) >= -1e-15
    assert max(jumps) < 1e-4


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations(ablation):
    full, preset = by_name("prosparse-llama2-7b"), by_name(f"prosparse-llama2-7b/{ablation}")
    assert preset.schedule.total_steps == full.schedule.total_steps
    assert preset.learning_rate == full.learning_rate
    factors = {preset.schedule.at(step) for step in range(5001, 16501, 100)}
    assert factors == {0.2 if ablation == "constant-lambda" else 0.0}
    assert preset.schedule.at(5000) == 0
    assert preset.shift == (0.1 if ablation == "shifted-relu" else None)


def test_presets_belong_to_their_models():
    preset = by_name("minicpm-s-1b")
    preset.check_model(hidden_size=1536, num_hidden_layers=52)
    assert preset.matrix_rate == 1 / 6
    with pytest.raises(ValueError, match="30 of 576"):
        preset.check_model(hidden_size=576, num_hidden_layers=30)
    for wrong in ("minicpm", "minicpm-s-1b/no-such"):
        with pytest.raises(ValueError, match="known are"):
            by_name(wrong)


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ((), "at least one"),
        ((Stage("a", 0.1, 5), Stage("b", 0.1, 5)), "must rise"),
        ((Stage("a", -0.1, 5),), "0 or positive"),
        ((Stage("a", float("nan"), 5),), "0 or positive"),
        ((Stage("a", 0.2, 5), Stage("b", 0.1, 9, "sine")), "below"),
    ],
)
def test_bad_schedules(stages, match):
    with pytest.raises(ValueError, match=match):
        LambdaSchedule(stages)


def test_steps_count_from_one():
    with pytest.raises(ValueError, match="from 1"):
        by_name("minicpm-s-1b").schedule.at(0)
    with pytest.raises(ValueError, match="one of each"):
        LambdaSchedule.progressive(10, (0.1, 0.2), (20,))


def test_cosine():
    rate = LearningRate("cosine", 1e-3, total_steps=110, warmup_steps=10)
    assert rate.at(1) == pytest.approx(1e-4)
    assert rate.at(10) == pytest.approx(1e-3)
    assert rate.at(60) == pytest.approx(0.55e-3)  # half way between the peak and a tenth of it
    assert rate.at(110) == rate.at(1000) == pytest.approx(1e-4)


def test_wsd():
    rate = LearningRate("wsd", 0.01, total_steps=1000, stable_until=400, half_life=100)
    assert rate.at(400) == 0.01
    assert rate.at(500) == pytest.approx(0.005)
    assert rate.at(700) == pytest.approx(0.00125)


@pytest.mark.parametrize(
    "arguments", [("linear", 1.0, 10), ("cosine", 0.0, 10), ("cosine", 1.0, 10, 10), ("constant", 1.0, 0)]
)
def test_bad_learning_rates(arguments):
    with pytest.raises(ValueError, match=r"learning rate|warm-up"):
        LearningRate(*arguments)
