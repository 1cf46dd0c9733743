"""Learning rates as functions of progress."""


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
