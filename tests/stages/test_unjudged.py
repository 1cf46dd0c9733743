"""Evaluation without a judge: the reward model compares, and nothing claims to be gold."""

import json
import shutil
from types import SimpleNamespace

import pytest

from align.errors import UserError
from align.evaluate.policies import policy_paths
from align.evaluate.schema import check_summary
from align.text import Codec
from stages.evaluate import say_other_temperatures


@pytest.fixture(scope="module")
def unjudged(mini, evaluated, tmp_path_factory):
    """The mini run with `judge: null`, on held-out rankings of the fixture `evaluated`, at another temperature."""
    run = tmp_path_factory.mktemp("unjudged")
    rankings = evaluated / "contrast.jsonl"
    options = {"judge": "null", "temperature": 0.7, "run_dir": run, "output_dir": run / "report"}
    mini.stage("evaluate", mini.run, rankings_file=rankings, **options)
    return run


def test_summary_has_the_reward_models_view_in_place_of_gold(unjudged):
    summary = json.loads((unjudged / "summary.json").read_text(encoding="utf-8"))
    check_summary(summary)
    assert set(summary["by_reward_model"]) == {name for name, policy in summary["policies"].items() if policy}
    for name, modes in summary["by_reward_model"].items():
        policy = summary["policies"][name]
        assert policy["sampled"] == {"gold": None, "gain_vs_sft": None, "win_rate_vs_sft": None}
        assert modes["sampled"]["score"]["mean"] == pytest.approx(policy["proxy"])
        assert modes["sampled"]["kl"]["mean"] == pytest.approx(policy["kl"])
        assert 0 <= modes["sampled"]["repetition"]["mean"] <= 1
    assert summary["rm"]["gold_accuracy"] is None and summary["rm"]["accuracy"]["mean"] >= 0
    sft = summary["by_reward_model"]["sft"]["greedy"]
    assert sft["gain_in_deviations"]["mean"] == 0 and sft["kl"] is None and sft["win_rate_vs_sft"]["mean"] == 0.5


def test_gain_is_paired_and_in_standard_deviations_of_sft(unjudged):
    evaluation = json.loads((unjudged / "evaluation.json").read_text(encoding="utf-8"))
    scores = {name: [r["proxy"] for r in evaluation["policies"][name]["sampled"]] for name in ("sft", "ppo_ptx")}
    mean = sum(scores["sft"]) / len(scores["sft"])
    spread = (sum((x - mean) ** 2 for x in scores["sft"]) / (len(scores["sft"]) - 1)) ** 0.5
    gain = sum(a - b for a, b in zip(scores["ppo_ptx"], scores["sft"], strict=True)) / len(scores["sft"])
    numbers = evaluation["by_reward_model"]["ppo_ptx"]["sampled"]
    assert numbers["gain_vs_sft"]["mean"] == pytest.approx(gain)
    assert numbers["gain_in_deviations"]["mean"] == pytest.approx(gain / spread)
    assert numbers["gain_in_deviations"]["low"] == pytest.approx(numbers["gain_vs_sft"]["low"] / spread)


def test_a_policy_that_is_nowhere_is_an_error_and_one_not_trained_is_not(mini, capsys, tmp_path):
    paths = {"base_path": None, "sft_path": str(mini.run / "sft"), "ppo_ptx_path": None}
    config = SimpleNamespace(**paths, ppo_path=str(mini.run / "ppo-plain"), temperature=1.0)
    assert policy_paths(config, Codec.load(config.sft_path))["ppo"] is None
    assert "holds no model: not evaluated" in capsys.readouterr().out
    config.ppo_path = str(tmp_path / "runz" / "ppo")
    with pytest.raises(UserError, match="ppo_path"):
        policy_paths(config, Codec.load(config.sft_path))


def test_the_report_never_says_gold(unjudged):
    report = (unjudged / "report" / "report.md").read_text(encoding="utf-8")
    page = (unjudged / "report" / "index.html").read_text(encoding="utf-8")
    assert "by the reward model that it climbed" in report and "may offend" in report and "may offend" in page
    assert "Mean Likert" not in report and "Gold: mean" not in report and "Policies by the reward model" in page
    assert (unjudged / "report" / "plots" / "policies.png").stat().st_size > 1000


def test_answers_are_drawn_at_the_temperature_asked_for(unjudged, evaluated):
    cooler, warmer = (json.loads((run / "evaluation.json").read_text("utf-8")) for run in (unjudged, evaluated))
    assert (cooler["temperature"], warmer["temperature"]) == (0.7, 1.0)
    answers = {
        mode: [[row["response"] for row in run["policies"]["sft"][mode]] for run in (cooler, warmer)]
        for mode in ("sampled", "greedy")
    }
    assert answers["sampled"][0] != answers["sampled"][1] and answers["greedy"][0] == answers["greedy"][1]
    assert "drawn at temperature 0.7" in (unjudged / "report" / "report.md").read_text("utf-8")


def test_a_temperature_that_is_not_that_of_training_is_said(mini, capsys):
    run = mini.run
    paths = {"base_path": str(run / "base"), "sft_path": str(run / "sft"), "ppo_path": None}
    config = SimpleNamespace(**paths, ppo_ptx_path=str(run / "ppo"))
    codec = Codec.load(config.sft_path)
    found = policy_paths(config, codec)
    say_other_temperatures(found, 1.0)
    assert "temperature" not in capsys.readouterr().out
    say_other_temperatures(found, 0.7)
    (line,) = capsys.readouterr().out.splitlines()
    assert "/ppo was trained on answers drawn at 1, these are drawn at 0.7" in line


def test_a_policy_trained_elsewhere_is_evaluated(mini, evaluated, tmp_path):
    """It has no manifest, so no step-zero numbers; all its other numbers are written."""
    shutil.copytree(
        mini.run / "ppo", tmp_path / "theirs", ignore=shutil.ignore_patterns("manifest.json", "value_model")
    )
    options = {"judge": "null", "run_dir": tmp_path, "output_dir": tmp_path / "report", "num_prompts": 3}
    paths = {"base_path": "null", "few_shot_file": "null", "ppo_path": tmp_path / "theirs", "ppo_ptx_path": "null"}
    mini.stage("evaluate", mini.run, rankings_file=evaluated / "contrast.jsonl", **options, **paths)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["step_zero"] is None and summary["policies"]["ppo"]["kl"] is not None


def test_prompts_and_a_reward_are_enough(mini, tmp_path):
    """Who has neither rankings nor text goes without their numbers, with and without a judge."""
    options = {"rankings_file": "null", "text_file": "null", "few_shot_file": "null", "num_prompts": 3}
    for judge in ("null", "data.world.judge:judge"):
        run = tmp_path / judge.partition(":")[0]
        mini.stage("evaluate", mini.run, judge=judge, run_dir=run, output_dir=run / "report", **options)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        check_summary(summary)
        assert summary["rm"] is None and summary["labelers"] == {"agreement": None}
        assert summary["policies"]["sft"]["perplexity"] is None and summary["policies"]["sft"]["proxy"] is not None
        report = (run / "report" / "report.md").read_text(encoding="utf-8")
        assert "nan" not in report.lower().split() and "### Reward model\n" not in report


def test_a_function_in_place_of_a_reward_model(mini, tmp_path, monkeypatch):
    """PPO against a function alone is evaluated by that function: here by an answer's length, negative."""
    (tmp_path / "brevity.py").write_text(
        "def short(completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"judge": "null", "reward_model_path": "null", "reward_function": "brevity:short"}
    rankings = mini.run / "rankings" / "validation.jsonl"
    options |= {"rankings_file": rankings, "run_dir": tmp_path, "output_dir": tmp_path / "report"}
    mini.stage("evaluate", mini.run, **options)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    answers = evaluation["policies"]["sft"]["greedy"]
    decoded = [answer["proxy"] for answer in answers]
    assert all(score <= -len(answer["response"]) for score, answer in zip(decoded, answers, strict=True))
    assert len(set(decoded)) > 1 and evaluation["rm"]["demonstration_mean"] is None
