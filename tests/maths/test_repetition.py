"""Repeated n-grams against hand counts and a plain loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.maths.repetition import repeated_ngrams


def test_goldens():
    rows = torch.tensor([[1, 2, 3, 1, 2, 3, 1], [5, 5, 5, 5, 9, 9, 9], [1, 2, 3, 4, 5, 6, 7], [4, 4, 4, 4, 4, 4, 4]])
    lengths = torch.tensor([7, 4, 7, 2])
    # 123 231 312 123 231: 2 of 5 stood before. 555 555: 1 of 2, and what follows is padding. All new. No 3-gram at all.
    assert repeated_ngrams(rows, lengths).tolist() == pytest.approx([0.4, 0.5, 0.0, 0.0])
    assert repeated_ngrams(rows, lengths, n=1).tolist() == pytest.approx([4 / 7, 3 / 4, 0.0, 1 / 2])


def test_rows_narrower_than_an_ngram():
    assert repeated_ngrams(torch.tensor([[1, 1], [2, 2]]), torch.tensor([2, 1])).tolist() == [0.0, 0.0]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=5), st.integers(1, 4))
def test_a_loop_over_sets_agrees(rows, n):
    width = max(map(len, rows)) + 2
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    expected = []
    for row in rows:
        ngrams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        expected.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    assert repeated_ngrams(padded, torch.tensor(list(map(len, rows))), n).tolist() == pytest.approx(expected, abs=1e-6)
