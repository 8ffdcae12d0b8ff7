"""How much less than what is expected is counted on."""

import pytest

from services.optimizer.caution import Caution
from services.optimizer.settings import OptimizerSettings


def test_several_bounds_hold_together_as_often_as_one():
    """Of two each may be missed half as often, of three a third: 1.645 standard deviations become 1.96 and 2.13."""
    caution = OptimizerSettings().aims.caution
    assert caution.together({"preference": 0.9}) == {"preference": pytest.approx(1.645)}
    assert caution.together({"preference": 0.9, "correctness": 1.0})["correctness"] == pytest.approx(1.960, abs=1e-3)
    assert caution.together({"a": 0.9, "b": 0.9, "c": 0.9})["b"] == pytest.approx(2.128, abs=1e-3)


def test_a_bound_of_nothing_is_none():
    assert Caution(1.645).together({"preference": 0.9, "correctness": 0.0}) == {"preference": pytest.approx(1.645)}


def test_a_caution_that_is_given_by_metric_is_taken_as_it_is():
    settings = OptimizerSettings(caution=0.0, cautions={"correctness": 0.5})
    assert settings.aims.caution.together({"a": 0.9, "correctness": 0.9}) == {"a": 0.0, "correctness": 0.5}
    rules = settings.estimate_rules.quality
    assert (rules.of("a").caution, rules.of("correctness").caution) == (0.0, 0.5)
