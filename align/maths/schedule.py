"""Learning rates as functions of progress."""

import math


def warmup_factor(iteration: int, warmup_iterations: int, start: float = 0.1) -> float:
    """Share of the peak rate at a 0-based iteration: `start` at the first, 1 from `warmup_iterations` on (App. C.4).

    The paper does not give the ramp's shape; linear is assumed.
    """
    if iteration >= warmup_iterations:
        return 1.0
    return start + (1.0 - start) * iteration / warmup_iterations


def linear_decay(iteration: int, num_iterations: int, end: float = 0.1) -> float:
    """1 at iteration 0, `end` at the last."""
    if num_iterations <= 1:
        return 1.0
    return 1.0 - (1.0 - end) * iteration / (num_iterations - 1)


def cosine_to(step: int, num_steps: int, end: float = 0.1) -> float:
    """1 at step 0, `end` at the last step, half a cosine between (App. C.1: to 10% of peak, no warm-up)."""
    if num_steps <= 1:
        return 1.0
    progress = min(step / (num_steps - 1), 1.0)
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def trapezoid(step: int, num_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Linear up over `warmup_steps`, flat, then linear down to 0 over the last `decay_fraction` of the steps."""
    up = (step + 1) / max(warmup_steps, 1)
    down = (num_steps - step) / max(decay_fraction * num_steps, 1)
    return max(0.0, min(1.0, up, down))
