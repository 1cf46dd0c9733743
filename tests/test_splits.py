"""align/splits.py: no prompt or customer on two sides, filters, splits by a hash (D1)."""

from collections import Counter

import pytest

from align.data import load_prompts
from align.errors import UserError
from align.splits import (
    cap_per,
    check_splits,
    dedupe_prefix,
    drop_pii,
    has_pii,
    keep_apart,
    prompt_key,
    refuse_eval_only,
    split_by,
    split_of,
)
from align.types import Prompt
from tests.folders import lines

USER, REPLY = ({"role": role, "content": content} for role, content in (("user", "hi"), ("assistant", "yes")))


def customers() -> list[Prompt]:
    sizes = {f"c{i}": 1 + (i * 37) % 23 for i in range(60)} | {"heavy": 450}
    rows = [
        Prompt(f"Please do task {n} of {name} in words", {"customer": name})
        for name, k in sizes.items()
        for n in range(k)
    ]
    rows += [Prompt("Write to ann@example.org about it", {"customer": "c1"}), rows[5]]
    return rows


def test_D1_no_customer_in_two_splits_and_filters_hold():
    rows = dedupe_prefix(customers(), 30)
    rows = cap_per(rows, lambda row: row.columns["customer"], 200)
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    splits = split_by(rows, lambda row: row.columns["customer"], shares, seed=1)
    splits["train"] = drop_pii(splits["train"])

    homes = {name: {row.columns["customer"] for row in split} for name, split in splits.items()}
    assert not homes["train"] & homes["validation"] and not (homes["train"] | homes["validation"]) & homes["test"]
    assert all(splits.values()) and set.union(*homes.values()) == {row.columns["customer"] for row in rows}
    counts = [sum(row.columns["customer"] == "heavy" for row in split) for split in splits.values()]
    assert max(counts) == sum(counts) == 200
    prefixes = [prompt_key(row.prompt)[:30] for row in splits["train"]]
    assert len(prefixes) == len(set(prefixes))
    assert not any(has_pii(row.prompt) for row in splits["train"])
    assert check_splits({name: [row.prompt for row in split] for name, split in splits.items()}) == []


def test_D1_split_is_deterministic_near_its_shares_and_keeps_order():
    rows, shares = [(i % 200, i) for i in range(2000)], {"train": 0.7, "validation": 0.2, "test": 0.1}
    first = split_by(rows, lambda row: row[0], shares, 3)
    assert first == split_by(rows, lambda row: row[0], shares, 3)
    assert first != split_by(rows, lambda row: row[0], shares, 4)
    assert {name: len(split) for name, split in first.items()} == {"train": 1400, "validation": 400, "test": 200}
    assert all(split == sorted(split, key=lambda row: row[1]) for split in first.values())
    with pytest.raises(UserError, match="do not sum to 1"):
        split_by(rows, lambda row: row[0], {"train": 0.7}, 3)


def test_D1_at_most_so_many_prompts_a_customer():
    assert cap_per([("a", 1), ("b", 1), ("a", 2), ("a", 3)], lambda row: row[0], 2) == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
    ]


def test_D1_shared_prefix_keeps_the_first():
    rows = ["Summarise this: one", "Summarise  this: two", "Summarise", "Translate this"]
    assert dedupe_prefix(rows, 15) == ["Summarise this: one", "Summarise", "Translate this"]


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
    assert has_pii(text) and drop_pii([Prompt(text), Prompt("fine")]) == [Prompt("fine")]


@pytest.mark.parametrize(
    "text",
    ["On 2023-09-19 at 12:30", "1 000 000 people", "3.14159265358979323846", "@home and user@", "4111 1111 1111 1112",
     "ISBN 978-3-16-148410-0", "1 2 3 4 5 6 7 8 9", "2+2=4, 12-34-56", "card 3782 822463 10006",
     "422222222222", "63040000000000000000"],  # check digits are right, and 12 or 20 digits are no card
)  # fmt: skip
def test_D1_other_numbers_are_no_personal_data(text):
    assert not has_pii(text)


@pytest.mark.parametrize(
    "text", ["a." * 100_000, "1 " * 100_000, "a@" * 100_000, "a@" + "a." * 100_000, "+1 " * 100_000]
)
def test_D1_the_filter_takes_linear_time(text):
    assert not has_pii(text)


def test_D1_a_prompt_in_two_splits_is_a_problem():
    named = {
        "train.jsonl": ["a  b", "c"],
        "validation.jsonl": [({"role": "user", "content": "a b"},), "d"],
        "test": ["e"],
    }
    (problem,) = check_splits(named)
    assert problem.kind == "in_two_splits"
    assert str(problem).startswith("validation.jsonl: 1 of its 2 prompts are also in train.jsonl: split by prompt")


def test_D1_rows_in_two_splits_stop_or_are_dropped(tmp_path):
    path = lines(tmp_path / "v.jsonl", {"prompt": "a"}, {"prompt": "b "})
    rows, report = load_prompts(path)
    with pytest.raises(UserError, match="prompts of 1 of its 2 rows"):
        keep_apart(rows, report, [Prompt("b")])
    kept, less = keep_apart(rows, report, [Prompt("b")], "drop")
    assert [row.prompt for row in kept] == ["a"] and less.dropped == {"in_two_splits": 1} and less.rows_used == 1
    assert keep_apart(rows, report, [Prompt("z")]) == (rows, report)
    with pytest.raises(UserError, match="every prompt"):
        keep_apart(rows, report, rows, "drop")


def test_D1_the_same_words_by_another_speaker_are_another_prompt():
    """A lone message of the user is the plain text; one of anybody else is not."""

    def says(*turns: tuple[str, str]) -> tuple[dict[str, str], ...]:
        return tuple({"role": role, "content": content} for role, content in turns)

    assert prompt_key(says(("user", " a\n b "))) == prompt_key("a b") == "a b"
    prompts = [
        "a",
        says(("system", "a")),
        says(("assistant", "a")),
        says(("system", "a"), ("user", "b")),
        says(("user", "a"), ("user", "b")),
        says(("user", "b"), ("system", "a")),
    ]
    assert len({prompt_key(prompt) for prompt in prompts}) == len(prompts)


# Splits by a hash of the prompt


def test_split_of_depends_on_the_opening_question_alone():
    shares = {"train": 0.5, "validation": 0.5}
    later = ({"role": "system", "content": "s"}, USER, REPLY, {"role": "user", "content": "so?"})
    for seed in range(20):
        home = split_of("hi", shares, seed)
        assert split_of(" hi\n", shares, seed) == split_of((USER,), shares, seed) == home
        assert split_of(later, shares, seed) == home
    assert len({split_of("hi", shares, seed) for seed in range(20)}) == 2


def test_split_of_follows_the_shares():
    shares = {"a": 0.7, "b": 0.2, "c": 0.1}
    found = Counter(split_of(str(i), shares) for i in range(2000))
    assert all(abs(found[name] / 2000 - share) < 0.04 for name, share in shares.items())
    # A larger training share takes rows from the validation split and gives it none: it can grow without a leak.
    less, more = ({i for i in range(500) if split_of(str(i), {"t": s, "v": 1 - s}) == "t"} for s in (0.6, 0.8))
    assert less < more
    with pytest.raises(UserError, match="do not sum to 1"):
        split_of("a", {"a": 0.5})


def test_rows_marked_eval_only_are_refused(tmp_path):
    rows, report = load_prompts(lines(tmp_path / "p.jsonl", {"prompt": "a", "eval_only": True}, {"prompt": "b"}))
    with pytest.raises(UserError, match="p.jsonl: 1 rows are marked eval_only"):
        refuse_eval_only(rows, report)
    refuse_eval_only(rows[1:], report)


def test_rows_marked_false_may_be_trained_on(tmp_path):
    rows, report = load_prompts(lines(tmp_path / "p.jsonl", {"prompt": "a", "eval_only": False}, {"prompt": "b"}))
    assert rows[0].columns["eval_only"] is False
    refuse_eval_only(rows, report)
