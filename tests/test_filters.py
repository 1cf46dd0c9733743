"""align/filters.py: openings that repeat, rows of one customer, personal data (D1)."""

import pytest

from align.errors import UserError
from align.filters import Cap, Repeats, has_personal_data


def kinds(repeats: Repeats, *rows: tuple[str, str | None]) -> list[str | None]:
    found = []
    for i, (prompt, user) in enumerate(rows):
        problem = repeats.problem(f"f:{i}", prompt, {"user": user})
        found.append(problem and problem.kind)
        if problem is None:
            repeats.keep(f"f:{i}", prompt, {"user": user})
    return found


def test_D1_shared_prefix_keeps_the_first():
    prompts = ("Summarise this: one", "Summarise  this: two", "Summarise", "Translate this", "Summarise")
    expected = [None, "shared_prefix", None, None, "shared_prefix"]
    assert kinds(Repeats(15, None), *((prompt, None) for prompt in prompts)) == expected
    assert kinds(Repeats(None, None), *((prompt, None) for prompt in prompts)) == [None] * 5


def test_D1_at_most_so_many_prompts_a_customer():
    rows = [("one", "a"), ("two", "b"), ("three", "a"), ("four", "a"), ("five", "b")]
    assert kinds(Repeats(None, Cap("user", 2)), *rows) == [None, None, None, "over_max_rows_per", None]
    again = [
        ("one", "a"),
        ("one", "a"),
        ("two", "a"),
        ("three", "a"),
        ("three", "b"),
    ]  # what is left out does not count
    assert kinds(Repeats(9, Cap("user", 2)), *again) == [None, "shared_prefix", None, "over_max_rows_per", None]
    assert Cap("user").rows == 200, "the paper's"
    with pytest.raises(UserError, match="f:1: no column 'user'"):
        kinds(Repeats(None, Cap("user", 2)), ("one", "a"), ("two", None))


@pytest.mark.parametrize(
    "text",
    [
        "mail me: a.b+c@mail.example.co.uk.", "call +44 20 7946 0958 now", "(555) 010-9999", "555-010-9999",
        "打电话13800138000。",
        "138-0013-8000", "card 4111 1111 1111 1111", "4111111111111111", "身份证11010519491231002X",
        "card 3782 822463 10005", "card 4222222222222", "card 6304000000000000000",  # of 15, 13 and 19 digits
        ({"role": "user", "content": "a@b.org"},),
    ],
)  # fmt: skip
def test_D1_personal_data_is_found(text):
    assert has_personal_data(text)


@pytest.mark.parametrize(
    "text",
    ["On 2023-09-19 at 12:30", "1 000 000 people", "3.14159265358979323846", "@home and user@", "4111 1111 1111 1112",
     "ISBN 978-3-16-148410-0", "1 2 3 4 5 6 7 8 9", "2+2=4, 12-34-56", "card 3782 822463 10006",
     "422222222222", "63040000000000000000"],  # check digits are right, and 12 or 20 digits are no card
)  # fmt: skip
def test_D1_other_numbers_are_no_personal_data(text):
    assert not has_personal_data(text)


@pytest.mark.parametrize(
    "text", ["a." * 100_000, "1 " * 100_000, "a@" * 100_000, "a@" + "a." * 100_000, "+1 " * 100_000]
)
def test_D1_the_filter_takes_linear_time(text):
    assert not has_personal_data(text)
