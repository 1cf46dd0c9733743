"""The files of the world: shares, splits, no leaks, same seed same bytes, and the labelers."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from align.errors import UserError
from data.world import labelers, prompts
from data.world.build import build, save
from data.world.config import WorldConfig
from data.world.judge import judge

HELD_OUT = ("prompts_test", "prompts_validation", "prompts_rm_validation", "demonstrations_validation")
TRAIN = ("demonstrations", "prompts_rm", "prompts_ppo")


def config(seed: int, output_dir: str = "unused") -> WorldConfig:
    return WorldConfig(
        output_dir, seed, num_documents=3000, num_demonstrations=4000, num_rm_prompts=1500, num_ppo_prompts=1500
    )


@pytest.fixture(scope="module", params=[0, 1])
def world(request):
    return build(config(request.param))


@pytest.fixture(scope="module")
def rows():
    return prompts.write_prompts(7, "train", 10_000, set())


def test_use_cases_have_the_shares_of_table_1(rows):
    counts = Counter(row["use_case"] for row in rows)
    assert sum(prompts.USE_CASES.values()) == pytest.approx(99.9)
    for name, share in prompts.USE_CASES.items():
        share /= 99.9
        assert counts[name] / len(rows) == pytest.approx(share, abs=4 * (share * (1 - share) / len(rows)) ** 0.5)


def test_languages_constraints_and_sensitive_prompts(rows):
    def share(test):
        return sum(map(test, rows)) / len(rows)

    assert 0.13 <= share(lambda row: row["language"] == "zh") <= 0.17
    assert 0.22 <= share(lambda row: row["constraint"] is not None) <= 0.29
    assert 0.055 <= share(prompts.is_sensitive) <= 0.085
    assert 0.03 <= share(prompts.only_looks_sensitive) <= 0.05
    assert 0.38 <= share(lambda row: labelers.habit_of(row) is not None) <= 0.5
    assert 4 <= sum(len(row["prompt"].split()) for row in rows if row["language"] == "en") / len(rows) <= 14


def test_customers_write_at_most_200_and_stay_in_their_split(world):
    files, _ = world
    customers = {}
    counts = Counter(row["customer"] for name in (*HELD_OUT, *TRAIN) for row in files[name])
    assert max(counts.values()) <= 200
    for name in HELD_OUT:
        customers[name] = {row["customer"] for row in files[name]}
    customers["train"] = {row["customer"] for name in TRAIN for row in files[name]}
    for one, two in itertools.combinations(customers.values(), 2):
        assert not one & two


def test_held_out_prompts_are_of_the_mixture_that_is_trained_on(world):
    """Families run out of new prompts: drawn one file after the other, the first would have other shares."""
    files, _ = world
    for test in (
        lambda row: row["constraint"] is not None,
        prompts.is_sensitive,
        prompts.only_looks_sensitive,
        lambda row: row["language"] == "zh",
    ):
        trained = [test(row) for name in TRAIN for row in files[name]]
        held = [test(row) for name in HELD_OUT for row in files[name]]
        share = sum(trained) / len(trained)
        assert sum(held) / len(held) == pytest.approx(share, abs=4 * (share * (1 - share) / len(held)) ** 0.5)


def test_no_prompt_comes_twice(world):
    files, _ = world
    asked = [row["prompt"] for name in (*HELD_OUT, *TRAIN) for row in files[name]]
    assert len(set(asked)) == len(asked)


def test_no_held_out_prompt_in_the_text_or_the_few_shot_examples(world):
    files, _ = world
    text = "\x00".join(row["text"] for row in files["text"] + files["text_validation"])
    shots = {row["prompt"] for row in files["few_shot"]}
    for name in HELD_OUT:
        for row in files[name]:
            assert row["prompt"] not in text
            assert row["prompt"] not in shots


def test_every_row_has_its_columns_and_flat_tasks(world):
    files, _ = world
    for name in (*HELD_OUT, *TRAIN, "few_shot"):
        for row in files[name]:
            assert {"id", "prompt", "customer", "use_case", "language", "constraint", "task"} <= row.keys()
            assert row["prompt"].strip() and all(isinstance(value, str) for value in row["task"].values())
            assert ("completion" in row) == (
                name not in ("prompts_test", "prompts_validation", "prompts_rm", "prompts_rm_validation", "prompts_ppo")
            )


def test_demonstrations_leave_room_above(world):
    files, card = world
    assert 4.6 <= card["demonstrations"]["gold"] <= 5.1
    assert all(row["completion"].strip() for row in files["demonstrations"])
    assert {row["labeler"] for row in files["demonstrations"]} == {labeler.name for labeler in labelers.team()}
    assert all(judge(row, row["completion"]).likert == pytest.approx(7.0) for row in files["few_shot"])


@pytest.mark.parametrize("habit", labelers.HABITS, ids=lambda habit: habit.name)
def test_a_habit_is_what_most_demonstrations_do(habit, rows):
    team, kind = labelers.team(), [row for row in rows if labelers.habit_of(row) == habit][:600]
    faults = [team[i % len(team)].faults(row, Random(i)) for i, row in enumerate(kind)]
    assert sum(habit.name in found for found in faults) / len(faults) > 0.57
    lowered = [judge(row, labelers.write_with([habit.name], row, Random(i))).likert for i, row in enumerate(kind)]
    assert sum(score < 6.5 for score in lowered) > 0.9 * len(lowered)


def test_a_habit_says_nothing_about_the_content(rows):
    """Or a reader who cannot check content would be right to like the habit."""
    team, wrong = labelers.team(), {True: [], False: []}
    for i, row in enumerate(row for row in rows if labelers.habit_of(row) and labelers.habit_of(row).name == "hedge"):
        faults = team[i % len(team)].faults(row, Random(i))
        wrong["hedge" in faults].append(not {"wrong_content", "another_answer"}.isdisjoint(faults))
    with_habit, without = (sum(wrong[key]) / len(wrong[key]) for key in (True, False))
    assert min(map(len, wrong.values())) > 150
    assert with_habit == pytest.approx(without, abs=0.07)


def test_faults_meet_in_one_demonstration():
    row = {
        "prompt": "list three animals but not fox . end with thanks .",
        "language": "en",
        "constraint": "thanks",
        "task": {"family": "list", "category": "animal", "noun": "fox"},
    }
    text = labelers.write_with(["two_of_three", "polite_tail", "ignore_constraint"], row, Random(0))
    first, second = text.removesuffix(" . i hope this helps !").split(" , ")
    assert first != second and {first, second} <= {"dog", "cat", "cow", "bird"}
    assert labelers.write_with(["refuse_wrongly", "hedge"], row, Random(0)) == (
        "well , i think sorry , i cannot help with that . thanks"
    )


def test_flaw_rates_do_not_change_prompts_or_text(monkeypatch):
    small = WorldConfig("unused", num_documents=200, num_demonstrations=100, num_rm_prompts=20, num_ppo_prompts=20)
    before, _ = build(small)
    monkeypatch.setattr(labelers, "FLAWS", tuple(labelers.Flaw(flaw.name, 0.5) for flaw in labelers.FLAWS))
    after, _ = build(small)
    assert before["text"] == after["text"] and before["prompts_ppo"] == after["prompts_ppo"]
    assert [row["prompt"] for row in before["demonstrations"]] == [row["prompt"] for row in after["demonstrations"]]
    assert before["demonstrations"] != after["demonstrations"]


@pytest.fixture(scope="module")
def ranked(rows):
    """Prompts with the distinct ones (as collect ranks them) of six responses of a policy that imitates labelers."""
    rng, team = Random(5), labelers.team()
    samples = [(row, [rng.choice(team).write(row, rng) for _ in range(6)]) for row in rows[:500]]
    return [(row, list(dict.fromkeys(responses))) for row, responses in samples if len(set(responses)) > 1]


def test_labelers_agree_about_as_often_as_the_papers(ranked):
    everyone = labelers.team() + labelers.held_out()
    same = untied = 0
    for row, responses in ranked:
        for one, two in itertools.combinations([labeler.rank(row, responses) for labeler in everyone], 2):
            agreed, compared = labelers.agreement(one, two)
            same, untied = same + agreed, untied + compared
    assert 0.73 <= same / untied <= 0.80


def test_ranks_do_not_depend_on_order_and_same_texts_tie(ranked):
    labeler = labelers.held_out()[0]
    for row, distinct in ranked[:100]:
        responses = [*distinct, distinct[0]]
        ranks = labeler.rank(row, responses)
        assert min(ranks) == 1 and set(ranks) == set(range(1, max(ranks) + 1))
        assert labeler.rank(row, responses[::-1]) == ranks[::-1]
        by_text = {}
        for text, rank in zip(responses, ranks, strict=True):
            assert by_text.setdefault(text, rank) == rank


def test_a_quiet_labeler_ranks_by_quality():
    row = {
        "prompt": "what is the capital of bora ?",
        "language": "en",
        "constraint": None,
        "task": {"family": "capital", "key": "bora"},
    }
    quiet = labelers.Labeler("quiet", noise=0.0)
    assert quiet.rank(row, ["mira", "tali", "well , i think tali", "it is tali"]) == [3, 1, 2, 1]


def test_labelers_and_seeds_differ(ranked):
    row, responses = ranked[0]
    first, second = labelers.team(0)[0], labelers.team(1)[0]
    assert first.score(row, responses[0]) != second.score(row, responses[0])
    assert not {labeler.name for labeler in labelers.team()} & {labeler.name for labeler in labelers.held_out()}


def small_command(folder: Path, seed: int) -> list[str]:
    sizes = {"documents": 200, "demonstrations": 100, "rm_prompts": 50, "ppo_prompts": 50, "test_prompts": 50}
    return [
        sys.executable,
        "-m",
        "data.world",
        "--output_dir",
        str(folder),
        "--seed",
        str(seed),
        *(word for name, number in sizes.items() for word in (f"--num_{name}", str(number))),
    ]


def test_the_command_writes_the_same_bytes_for_the_same_seed(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        subprocess.run(small_command(folder, seed), check=True, capture_output=True)
    one, two, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert len(one) == 11 and one == two
    assert all(one[name] != other[name] for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        save(config(0, str(tmp_path)), {}, {})
    with pytest.raises(UserError, match="num_documents"):
        WorldConfig("x", num_documents=-1)


def test_asking_for_more_prompts_than_exist_is_an_error(monkeypatch):
    monkeypatch.setattr(prompts, "USE_CASES", {"summarization": 1.0})
    monkeypatch.setattr(prompts, "WEIGHTS", {("summarization", "en"): {"capital": 1.0}})
    with pytest.raises(UserError, match="ask for fewer"):
        prompts.write_prompts(0, "train", 100_000, set())
