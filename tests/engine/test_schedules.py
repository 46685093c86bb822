import math

import pytest

from crossmae_det.engine.hooks import cosine_schedule, step_schedule


def test_steps_after_a_linear_warmup():
    schedule = step_schedule(1000, [0.5, 0.9], gamma=0.1, warmup_iters=50)
    rates = [schedule(i / 1000) for i in (0, 25, 50, 499, 500, 899, 900, 999)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_half_a_cosine_after_a_linear_warmup():
    schedule = cosine_schedule(1000, warmup_iters=100)
    end = 0.5 * (1 + math.cos(math.pi * 0.1))  # the warm-up meets the cosine where it then is
    assert schedule(0.05) == pytest.approx((0.001 + end) / 2, rel=1e-3)
    assert schedule(0.5) == pytest.approx(0.5)
    assert schedule(0.999) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("max_iter", [1, 2, 7])
def test_short_runs_have_a_schedule_too(max_iter):
    schedule = step_schedule(max_iter, [8 / 9, 26 / 27], warmup_iters=250)
    assert all(0 < schedule(i / max_iter) <= 1 for i in range(max_iter))
    assert schedule(0.5) == 1


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="at least one iteration, got 0"):
        cosine_schedule(0, warmup_iters=10)
