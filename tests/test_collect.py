"""align/collect.py: how many samples, which are shown, what the labelers' ranks become."""

import sys
import types
from collections import Counter

import pytest

from align.collect import Candidates, draw_k, group, load_labelers, rank_all, ranking_row
from align.config import CollectConfig
from align.data import parse_ranking
from align.errors import UserError
from align.runtime import Runtime
from align.types import Episode, Prompt
from stages.collect import rank, sample, to_label


class ByLength:
    def __init__(self, name):
        self.name, self.shown = name, []

    def rank(self, row, completions, finished):
        self.shown.append((row, completions, finished))
        return [float(len(text)) for text in completions]


class Short:
    name = "short"

    def rank(self, row, completions, finished):
        return [0.0]


class NotALabeler:
    pass


def no_labelers(seed):
    return []


def wrong_labelers(seed):
    return [NotALabeler()]


def candidates(*texts, **columns) -> Candidates:
    return Candidates(Prompt("p", columns), texts, tuple(True for _ in texts))


def test_k_is_uniform_over_4_to_9():
    sizes = draw_k(6000, 4, 9, seed=1)
    counts = Counter(sizes)
    assert set(counts) == {4, 5, 6, 7, 8, 9} and all(850 < count < 1150 for count in counts.values())
    assert sizes == draw_k(6000, 4, 9, seed=1) != draw_k(6000, 4, 9, seed=2)
    assert draw_k(3, 2, 2, 0) == [2, 2, 2]


def test_equal_and_empty_texts_are_shown_once_or_not_at_all(tiny_codec):
    def episode(text, finished=True):
        ids = tiny_codec.response(text)
        return Episode((5,), tuple(ids if finished else ids[:-1]), finished)

    episodes = [episode("cow"), episode("dog", False), episode("cow", False), episode(""), episode(" "), episode("fox")]
    first, second = group([Prompt("a"), Prompt("b")], [5, 1], episodes, tiny_codec)
    assert (first.prompt.prompt, first.completions, first.finished) == ("a", ("cow", "dog"), (True, False))
    assert (second.prompt.prompt, second.completions, second.finished) == ("b", ("fox",), (True,))


def test_rows_are_rankings_that_the_reader_accepts():
    labeler = ByLength("ann")
    rows, skipped = rank_all([candidates("aaa", "b", id="x", customer="c")], [labeler], 1, seed=0)
    assert rows == [
        {
            "prompt": "p", "labeler": "ann", "id": "x", "customer": "c", "finished": [True, True],
            "completions": [{"completion": "aaa", "rank": 3.0}, {"completion": "b", "rank": 1.0}],
        }
    ]  # fmt: skip
    ranking = parse_ranking(rows[0], Counter())
    assert ranking.completions == ("aaa", "b") and ranking.ranks == (3.0, 1.0) and ranking.labeler == "ann"
    assert labeler.shown == [({"prompt": "p", "id": "x", "customer": "c"}, ["aaa", "b"], [True, True])]
    assert not skipped


def test_what_gives_no_ranking_is_counted():
    rows, skipped = rank_all([candidates("a"), candidates("a", "b"), candidates("a", "bb")], [ByLength("ann")], 1, 0)
    assert len(rows) == 1 and skipped == {"fewer than two distinct completions": 1, "all tied": 1}


def test_labelers_are_drawn_without_repeating_one():
    team = [ByLength(name) for name in "abcde"]
    rows, _ = rank_all([candidates("a", "bb", id=i) for i in range(200)], team, 2, seed=3)
    by_prompt = {i: [row["labeler"] for row in rows if row["id"] == i] for i in range(200)}
    assert all(len(set(names)) == 2 for names in by_prompt.values())
    counts = Counter(row["labeler"] for row in rows)
    assert set(counts) == set("abcde") and all(count > 50 for count in counts.values())
    alone, _ = rank_all([candidates("a", "bb")], team[:1], 2, seed=3)
    assert len(alone) == 1


@pytest.mark.parametrize("size", [3, 6, 12])
def test_who_ranks_a_prompt_says_nothing_of_its_k(size):
    """Drawn from one stream, each labeler of six would see a single K."""
    team = [ByLength(f"{i:02}") for i in range(size)]
    sizes = draw_k(3000, 4, 9, seed=5)
    rows, _ = rank_all([candidates("a", "bb", k=k) for k in sizes], team, 1, seed=5)
    seen = {labeler.name: Counter(row["k"] for row in rows if row["labeler"] == labeler.name) for labeler in team}
    assert all(set(counts) == {4, 5, 6, 7, 8, 9} for counts in seen.values())
    assert all(max(counts.values()) < 2 * counts.total() / 6 for counts in seen.values())


def test_a_labeler_that_miscounts_is_named():
    with pytest.raises(UserError, match="short gave 1 ranks for 2 completions"):
        rank_all([candidates("a", "bb")], [Short()], 1, 0)


def test_labelers_by_import_path(monkeypatch):
    module = types.ModuleType("some_labelers")
    module.team = lambda seed: [ByLength(f"ann-{seed}")]
    module.none, module.wrong = no_labelers, wrong_labelers
    monkeypatch.setitem(sys.modules, "some_labelers", module)
    assert [labeler.name for labeler in load_labelers("some_labelers:team", "labelers", 7)] == ["ann-7"]
    for path in ("some_labelers:none", "some_labelers:wrong", "some_labelers:gone"):
        with pytest.raises(UserError, match="labelers: "):
            load_labelers(path, "labelers", 7)


def test_training_and_validation_prompts_draw_their_own_k(tiny_codec):
    """Every sample is another text, so that a prompt has as many completions as samples."""

    def sampler(queries, uniforms, temperature):
        return [Episode((5,), tuple(tiny_codec.response(f"cow {i}")), True) for i in range(len(queries))]

    config, prompts = CollectConfig(output_dir="out", max_new_tokens=2), [Prompt("hot")] * 40

    def sizes(stream: int) -> list[int]:
        found = sample(prompts, sampler, tiny_codec, config, Runtime(seed=0), stream)
        return [len(candidate.completions) for candidate in found]

    assert sizes(0) == sizes(0) and set(sizes(0)) == set(sizes(1)) == {4, 5, 6, 7, 8, 9}
    assert sum(one == other for one, other in zip(sizes(0), sizes(1), strict=True)) < 20


def test_every_held_out_labeler_ranks_every_validation_prompt(monkeypatch):
    module = types.ModuleType("some_labelers")
    module.team = lambda seed: [ByLength("ann"), ByLength("ben")]
    module.others = lambda seed: [ByLength(name) for name in ("cat", "dan", "eve")]
    monkeypatch.setitem(sys.modules, "some_labelers", module)
    config = CollectConfig(
        output_dir="out", labelers="some_labelers:team", held_out_labelers="some_labelers:others",
        labelers_per_prompt=1, validation_labelers_per_prompt=2,
    )  # fmt: skip
    found = {"train": [candidates("a", "bb", id=1)], "validation": [candidates("a", "bb", id=i) for i in (2, 3)]}
    tables, metrics = rank(found, config)
    names = {name: [(row["id"], row["labeler"]) for row in rows] for name, rows in tables.items()}
    assert sorted(names["held_out"]) == [(i, name) for i in (2, 3) for name in ("cat", "dan", "eve")]
    assert sorted(names["validation"]) == [(i, name) for i in (2, 3) for name in ("ann", "ben")]
    assert len(names["train"]) == 1 and metrics["held_out"] == {"prompts": 2, "rankings": 6, "skipped": {}}


def test_without_labelers_what_can_be_ranked_is_written(tmp_path):
    found = {"train": [candidates("a", "b", use_case="chat"), candidates("a"), candidates()], "validation": []}
    tables, metrics = rank(found, CollectConfig(output_dir=str(tmp_path), labelers=None))
    empty = [{"completion": "a", "rank": None}, {"completion": "b", "rank": None}]
    assert tables["train_to_label"] == [{"prompt": "p", "completions": empty, "use_case": "chat"}]
    counts = {"prompts": 3, "rankings": 1, "skipped": {"fewer than two distinct completions": 2}}
    assert metrics["train_to_label"] == counts


def test_answers_and_judgements_of_the_prompts_file_do_not_come_along():
    old = {"completions": [{"completion": "old", "rank": 0}], "labeler": "x", "chosen": "old", "use_case": "chat"}
    row = ranking_row(candidates("a", "bb", **old), ByLength("ann"))
    assert row["completions"] == [{"completion": "a", "rank": 1.0}, {"completion": "bb", "rank": 2.0}]
    assert row["labeler"] == "ann" and row["use_case"] == "chat" and "chosen" not in row
    tables, _ = to_label({"train": [candidates("a", "bb", **old)]})
    assert set(tables["train_to_label"][0]) == {"prompt", "completions", "use_case"}
    assert tables["train_to_label"][0]["completions"][0] == {"completion": "a", "rank": None}
