"""align/splits.py: no prompt on two sides, splits by a hash (D1)."""

from collections import Counter

import pytest

from align.data import load_prompts
from align.errors import UserError
from align.splits import (
    check_splits,
    keep_apart,
    prompt_key,
    refuse_eval_only,
    split_of,
)
from align.types import Prompt
from tests.folders import lines

USER, REPLY = ({"role": role, "content": content} for role, content in (("user", "hi"), ("assistant", "yes")))


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
