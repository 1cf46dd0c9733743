"""align/user_code.py: a user's functions fail with one line that names them, and the place in their file."""

import sys

import pytest

from align.collect import Candidates, load_labelers, rank_all
from align.errors import UserError
from align.judge import Judge
from align.rewards import FunctionReward
from align.types import Episode, Prompt

FILE = """import json
from types import SimpleNamespace

def judge(row, response, finished):
    score = json.loads(response)
    return SimpleNamespace(likert=score, as_dict=dict)

def no_likert(row, response, finished):
    return 5

def reward(completions, **columns):
    return [row["missing"] for row in [{}]]

class Labeler:
    name = "ann"

    def rank(self, row, completions, finished):
        return [1 / 0]

def team(seed):
    return [Labeler()]

def no_team(seed):
    raise FileNotFoundError("names.txt")
"""


@pytest.fixture(autouse=True)
def theirs(tmp_path, monkeypatch):
    (tmp_path / "their_code.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_code", raising=False)


def message(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_judge_names_the_prompt_and_its_own_line_not_the_librarys():
    judge = Judge("their_code:judge")
    assert judge({"prompt": "q"}, "3", True).likert == 3
    said = message(lambda: judge({"prompt": "secret", "id": "q7"}, "no number", True))
    assert said.startswith("judge: their_code:judge, asked of prompt 'q7', raised JSONDecodeError: ")
    assert said.endswith("(their_code.py:5); mend it") and "secret" not in said
    assert "gave a likert of nan" in message(lambda: judge({"id": 1}, "NaN", True))
    assert "'int' object has no attribute 'likert'" in message(lambda: Judge("their_code:no_likert")({}, "3", True))


def test_a_reward_function(tiny_codec):
    reward = FunctionReward("their_code:reward", tiny_codec)
    said = message(lambda: reward([Prompt("q")], [Episode((5,), (6, 1), True)]))
    assert said == "reward: their_code:reward raised KeyError: 'missing' (their_code.py:12); mend the function"


def test_labelers():
    candidates = [Candidates(Prompt("q"), ("a", "b"), (True, True))]
    team = load_labelers("their_code:team", "labelers", 0)
    said = message(lambda: rank_all(candidates, team, 1, 0))
    assert said == "labelers: ann raised ZeroDivisionError: division by zero (their_code.py:18); mend it"
    said = message(lambda: load_labelers("their_code:no_team", "held_out_labelers", 0))
    assert said.startswith("held_out_labelers: their_code:no_team raised FileNotFoundError: names.txt (their_code.py:")
