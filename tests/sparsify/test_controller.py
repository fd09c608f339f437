"""Threshold control: the rise of the target, its split over layers, and that the loop settles."""

import numpy as np
import pytest

from prosparse.sparsify import controller
from prosparse.sparsify.controller import TargetControl


def test_the_target_rises_along_a_sine():
    control = TargetControl(0.9, start=0.1, end=0.7)
    assert control.wanted(0.5, 0.0) == control.wanted(0.5, 0.1) == 0.5
    assert control.wanted(0.5, 0.4) == pytest.approx(0.7)
    assert control.wanted(0.5, 0.7) == control.wanted(0.5, 1.0) == pytest.approx(0.9)


def test_a_model_sparser_than_the_target_is_left_alone():
    assert TargetControl(0.5).wanted(0.8, 1.0) == 0.8
    natural = [0.1, 0.3]
    assert controller.layer_densities(natural, 0.5).tolist() == natural


def test_layers_share_in_proportion_to_their_natural_density():
    densities = controller.layer_densities([0.6, 0.3, 0.1, 0.0], 0.1)
    assert densities.mean() == pytest.approx(0.1)
    assert densities[0] / densities[1] == pytest.approx(2)
    assert densities[3] == 0


@pytest.mark.parametrize("target", [0.7, 0.9, 0.95])
def test_control_reaches_its_target(target):
    """Gates drawn from normals of different widths stand in for layers; 400 steps of the loop."""
    rng = np.random.default_rng(0)
    widths = np.array([0.3, 1.0, 3.0])
    control = TargetControl(target)
    thresholds = np.zeros(3)
    natural = np.array([0.5, 0.5, 0.5])
    for i in range(400):
        gates = rng.standard_normal((3, 4096)) * widths[:, None]
        densities = (gates >= np.maximum(thresholds, 1e-9)[:, None]).mean(1)
        wanted = controller.layer_densities(natural, 1 - control.wanted(0.5, i / 400))
        thresholds = controller.step(thresholds, densities, wanted, control.gain)
    assert 1 - densities.mean() == pytest.approx(target, abs=0.01)


def test_thresholds_never_fall_below_zero():
    thresholds = controller.step(np.array([0.01, 0.5]), np.array([0.0, 0.0]), np.array([0.5, 0.5]), 0.5)
    assert thresholds.tolist() == [0.0, 0.25]


def test_bad_values():
    for arguments in [(0.0,), (1.0,), (0.9, 0.5, 0.4), (0.9, 0.1, 0.7, 0.0)]:
        with pytest.raises(ValueError, match="must"):
            TargetControl(*arguments)
    for natural, overall in [([], 0.1), ([0.5, 1.5], 0.1), ([float("nan")], 0.1), ([0.5], 1.1)]:
        with pytest.raises(ValueError, match="densit"):
            controller.layer_densities(natural, overall)
    with pytest.raises(ValueError, match="not a number"):
        controller.step(np.zeros(1), np.array([np.nan]), np.zeros(1), 0.5)
