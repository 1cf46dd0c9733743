"""The penalty for answers that do not end, as a controller holds it."""

STEP = 1.0  # of the penalty, in the reward's unit, a change of one in the share that ends
DRIFT = 0.1  # and each iteration, a share of one that is missing


def adapt_eos_penalty(penalty: float, error: float, last_error: float) -> float:
    """The next penalty (<= 0, taken off unfinished answers); `error` is the share of answers wanted minus that which
    ended, now and an iteration ago.

    Proportional and integral control. The share moves at a pace that the penalty sets, so an integral alone, as the
    adaptive KL coefficient is, would swing about the target for ever.
    """
    return -max(0.0, abs(penalty) + STEP * (error - last_error) + DRIFT * error)
