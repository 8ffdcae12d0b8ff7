"""What a policy says of its limits and options: the program's own margins, prices and reduced costs."""

import pytest

from services.optimizer.outcome import extra_grams, limit_outcomes
from services.optimizer.policy import problem_of
from services.optimizer.program import solve_program
from tests.unit.test_cli_policy import METRIC, made


def test_a_binding_limit_has_a_price_and_its_margin_fills_the_gap():
    _, program = solve_program(problem_of(made()))
    limit = limit_outcomes(program)[METRIC]
    assert limit.required == pytest.approx(0.9)
    assert limit.mean - limit.margin == pytest.approx(limit.required, abs=1e-5)
    assert limit.margin > 0.0
    assert limit.carbon_points_per_point > 1.0


def test_a_limit_that_does_not_bind_costs_nothing():
    _, program = solve_program(problem_of(made(xi={METRIC: 0.9})))
    limit = limit_outcomes(program)[METRIC]
    assert limit.mean - limit.margin > limit.required
    assert limit.carbon_points_per_point == 0.0


def test_options_in_use_add_nothing_and_others_do():
    solution, program = solve_program(problem_of(made(holdout=0.0)))
    extra = extra_grams(program)
    for group, row in solution.rows.items():
        for option, probability in row.items():
            if probability > 1e-6:
                assert extra[group][option] == 0.0
            else:
                assert extra[group][option] > 0.0
    assert any(grams > 0.0 for row in extra.values() for grams in row.values())


def test_where_the_reference_serves_there_is_nothing_to_explain():
    assert limit_outcomes(None) == {}
    assert extra_grams(None) == {}
