"""align/order.py: a fixed order of rows, and where an interrupted run goes on in it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import UserError
from align.order import Cursor, epoch_order, evenly


def test_epoch_order_is_a_fixed_permutation():
    order = epoch_order(100, seed=5, epoch=2)
    assert sorted(order) == list(range(100)) and order == epoch_order(100, 5, 2)
    assert len({tuple(epoch_order(100, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_rows_are_evenly_spaced_over_the_file():
    assert evenly(list(range(10)), 4) == [0, 2, 5, 7] and evenly([1, 2], 0) == [1, 2] == evenly([1, 2], 5)
    assert evenly([], 3) == []


def test_a_cursor_spans_epochs_and_covers_each():
    cursor = Cursor(10, seed=0)
    flat = [i for _ in range(5) for i in cursor.take(4)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(0, 3), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 6))
def test_resumed_cursor_continues_like_the_uninterrupted_one(num_rows, seed, takes, stop):
    whole = Cursor(num_rows, seed)
    want = [whole.take(n) for n in takes]
    cursor = Cursor(num_rows, seed)
    got = [cursor.take(n) for n in takes[:stop]]
    saved, cursor = json.loads(json.dumps(cursor.state())), Cursor(num_rows, seed)
    cursor.load(saved)
    got += [cursor.take(n) for n in takes[stop:]]
    assert got == want and cursor.state() == whole.state()


def test_cursor_refuses_other_data():
    with pytest.raises(UserError, match="has 4 rows, the checkpoint was written with 5"):
        Cursor(4, 0).load(Cursor(5, 0).state())
    with pytest.raises(UserError, match="no rows"):
        Cursor(0, 0)
