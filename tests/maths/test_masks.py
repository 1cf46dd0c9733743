"""Positions and masks: goldens by hand, properties on ragged rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from align.maths.masks import action_positions, last_index, length_mask, response_tokens

# The three rows of the module's worked example: ends with EOS (9), only EOS, never ends.
INPUT_IDS = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 9, 0, 0, 0], [5, 6, 7, 8, 7, 8]])
QUERY = torch.tensor([2, 2, 2])
RESPONSE = torch.tensor([3, 1, 4])

rows = st.lists(
    st.tuples(
        st.lists(st.integers(1, 50), min_size=1, max_size=6), st.lists(st.integers(1, 50), min_size=1, max_size=6)
    ),
    min_size=1,
    max_size=5,
)


def pack(pairs, junk):
    """(query, response) pairs as right-padded ids, filled with junk past each row's end."""
    width = max(len(q) + len(r) for q, r in pairs)
    ids = torch.full((len(pairs), width), junk)
    for i, (q, r) in enumerate(pairs):
        ids[i, : len(q) + len(r)] = torch.tensor(q + r)
    return ids, torch.tensor([len(q) for q, _ in pairs]), torch.tensor([len(r) for _, r in pairs])


def test_length_mask_golden():
    expected = [[True, True, True, False], [True, False, False, False], [True, True, True, True]]
    assert length_mask(RESPONSE, 4).tolist() == expected
    assert length_mask(torch.tensor([0]), 2).tolist() == [[False, False]]
    assert length_mask(torch.tensor([5]), 2).tolist() == [[True, True]]


def test_last_index_golden():
    # 2 + 3 - 1 = 4 (the EOS), 2 + 1 - 1 = 2 (the EOS), 2 + 4 - 1 = 5 (the last token)
    assert last_index(QUERY, RESPONSE).tolist() == [4, 2, 5]
    assert INPUT_IDS.gather(1, last_index(QUERY, RESPONSE)[:, None]).squeeze(1).tolist() == [9, 9, 8]


def test_action_positions_golden():
    # the first response token sits at index 2 and is drawn from the state at index 1
    assert action_positions(QUERY, 4).tolist() == [[1, 2, 3, 4]] * 3
    assert action_positions(torch.tensor([1, 4]), 2).tolist() == [[0, 1], [3, 4]]


def test_response_tokens_golden():
    tokens, mask = response_tokens(INPUT_IDS, QUERY, 4), length_mask(RESPONSE, 4)
    assert [row[m].tolist() for row, m in zip(tokens, mask, strict=True)] == [[7, 8, 9], [9], [7, 8, 7, 8]]


@given(rows, st.integers(0, 60))
def test_ragged_rows_come_back(pairs, junk):
    ids, query_lengths, response_lengths = pack(pairs, junk)
    width = int(response_lengths.max())
    tokens = response_tokens(ids, query_lengths, width)
    for i, (_, r) in enumerate(pairs):
        assert tokens[i, : len(r)].tolist() == r


def test_columns_past_the_tensor_do_not_crash():
    assert response_tokens(torch.zeros(1, 3, dtype=torch.long), torch.tensor([3]), 5).shape == (1, 5)
