"""Learning-rate schedules as multipliers of the base rate, in iterations."""

from collections.abc import Sequence

from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

# A run too short for its warm-up still spends most of its iterations at the full rate.
LONGEST_WARMUP = 0.1


def _with_warmup(scheduler: ParamScheduler, max_iter: int, warmup_iters: int) -> ParamScheduler:
    if max_iter < 1:
        raise ValueError(f"a schedule needs at least one iteration, got {max_iter}")
    length = min(warmup_iters / max_iter, LONGEST_WARMUP)
    if not length:
        return scheduler
    return WarmupParamScheduler(scheduler, warmup_factor=0.001, warmup_length=length)


def step_schedule(
    max_iter: int, milestones: Sequence[float], gamma: float = 0.1, warmup_iters: int = 250
) -> ParamScheduler:
    """Constant, times ``gamma`` at each milestone, after a linear warm-up.

    Args:
        max_iter: iterations of the run.
        milestones: fractions of the run in (0, 1), ascending.
        gamma: factor at each milestone.
        warmup_iters: iterations of warm-up; a tenth of the run at most.
    """
    # fvcore refuses a run of fewer steps than milestones: a short one is seen in a finer grid.
    steps = max(max_iter, 1000)
    return _with_warmup(
        MultiStepParamScheduler(
            values=[gamma**step for step in range(len(milestones) + 1)],
            milestones=[round(fraction * steps) for fraction in milestones],
            num_updates=steps,
        ),
        max_iter,
        warmup_iters,
    )


def cosine_schedule(max_iter: int, warmup_iters: int) -> ParamScheduler:
    """Half a cosine from 1 to 0 after a linear warm-up.

    Args:
        max_iter: iterations of the run.
        warmup_iters: iterations of warm-up; a tenth of the run at most.
    """
    return _with_warmup(CosineParamScheduler(1.0, 0.0), max_iter, warmup_iters)
