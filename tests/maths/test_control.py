"""align/maths/control.py: a penalty that holds the share of answers that end."""

import pytest

from align.maths.control import adapt_eos_penalty


def test_by_hand():
    assert adapt_eos_penalty(-0.5, 0.1, 0.0) == pytest.approx(-(0.5 + 0.1 + 0.01))  # fewer end than should
    assert adapt_eos_penalty(-0.5, 0.1, 0.1) == pytest.approx(-0.51)  # as few as before: the drift alone
    assert adapt_eos_penalty(-0.1, -0.3, 0.2) == 0.0  # no reward for an answer that does not end


@pytest.mark.parametrize("pays", [0.3, 0.5, 1.5])  # what an answer gains by not ending
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_share_comes_to_its_target_and_stays(pays, start):
    """A policy whose share moves at a pace that the penalty sets, as was measured: 0.55 an iteration a unit."""
    penalty, error, share, shares = -start, 0.0, 0.3, []
    for _ in range(160):
        share = min(max(share + 0.55 * (abs(penalty) - pays), 0.0), 1.0)
        last, error = error, 0.36 - share
        penalty = adapt_eos_penalty(penalty, error, last)
        shares.append(share)
    assert shares[100:] == pytest.approx([0.36] * 60, abs=0.05) and abs(penalty) == pytest.approx(pays, abs=0.05)
