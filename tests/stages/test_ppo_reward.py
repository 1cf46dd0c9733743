"""Stage 3 with the rewards users bring: another tokenizer, functions, and a limit on KL."""

import filecmp
import json
import sys
import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from align.checkpoint import checkpoint_fault

pytestmark = pytest.mark.xdist_group("stages")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Somebody else's reward model: bytes for tokens, no chat template, no manifest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("foreign")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        eos_token_id=0, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def brief(monkeypatch):
    module = types.ModuleType("user_rewards")
    module.brief = lambda prompts, completions, **columns: [-len(text) / 10 for text in completions]
    monkeypatch.setitem(sys.modules, "user_rewards", module)


def test_ppo_on_text_and_a_function(mini, foreign, brief, tmp_path, capsys):
    reward = f"[{{model: {foreign}, weight: 2, name: judge}}, {{function: user_rewards:brief, weight: 0.5}}]"
    capsys.readouterr()
    mini.stage("ppo", mini.run, output_dir=tmp_path / "out", reward=reward)
    out = capsys.readouterr().out
    assert f"value model: {mini.run / 'sft'} with a fresh head" in out
    assert (
        f"reward judge, weight 2: {foreign} has a tokenizer or format of its own, so it reads text (no manifest" in out
    )
    for row in rows(tmp_path / "out" / "metrics.jsonl"):
        total = 2 * row["objective/scores/judge"] + 0.5 * row["objective/scores/brief"]
        assert row["objective/raw_scores"] == pytest.approx(total, abs=1e-5)
        assert row["objective/scores_std/judge"] > 0 and row["objective/scores_std/brief"] > 0
        assert row["objective/failures/brief"] == row["objective/cut/judge"] == 0.0
        assert 0 <= row["objective/repetition"] <= 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert [(p["role"], p["stage"]) for p in manifest["parents"]] == [
        ("model_name_or_path", "sft"), ("reward[0].model", None)
    ]  # fmt: skip
    assert manifest["config"]["reward"][1] == {"function": "user_rewards:brief", "weight": 0.5, "name": ""}
    assert manifest["metrics"]["step_zero"]["value_minus_score"] is None
    assert manifest["metrics"]["stopped"] is None


def test_a_value_model_of_ours_beside_a_foreign_reward(mini, foreign, tmp_path, capsys):
    reward = f"[{{model: {foreign}}}, {{model: {mini.run / 'rm'}, weight: 0.25}}]"
    mini.stage("ppo", mini.run, output_dir=tmp_path / "out", reward=reward, total_episodes=16)
    assert f"value model: {mini.run / 'rm'}, compared with the score of rm at step zero" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert 0 <= manifest["metrics"]["step_zero"]["value_minus_score"] < 1e-3


def test_kl_over_its_limit_ends_the_run_and_a_higher_limit_goes_on(mini, tmp_path, capsys):
    """The stopped run leaves a model and a checkpoint; resumed, it gives the numbers of a run that never stopped."""
    changes = {"total_episodes": 64, "learning_rate": 1e-2, "warmup_iterations": 0, "kl_coef": 0, "seed": 3}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    mini.stage("ppo", mini.run, output_dir=whole, **changes)
    kl = [row["objective/kl"] for row in rows(whole / "metrics.jsonl")]
    limit = 0.5 * max(kl)
    last = next(i for i, nats in enumerate(kl) if nats > limit) + 1
    assert 1 < last < 4, "the setup should stop the run on its way"
    capsys.readouterr()
    mini.stage("ppo", mini.run, output_dir=stopped, kl_stop=limit, **changes)
    reason = f"stopped after iteration {last}: KL {kl[last - 1]:.3g} nats an episode is over kl_stop {limit:g}"
    assert f"{reason}; to go on, resume from checkpoint-{last} with a higher kl_stop" in capsys.readouterr().out
    assert len(rows(stopped / "metrics.jsonl")) == last
    manifest = json.loads((stopped / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["metrics"]["stopped"] == reason
    assert checkpoint_fault(stopped / f"checkpoint-{last}") is None
    mini.stage("ppo", mini.run, output_dir=stopped, resume_from_checkpoint=stopped / f"checkpoint-{last}", **changes)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert filecmp.cmp(whole / name, stopped / name, shallow=False), name


@pytest.mark.slow
def test_evaluation_with_a_reward_model_of_another_tokenizer(mini, evaluated, foreign, tmp_path):
    rankings = mini.run / "contrast.jsonl"
    changes = {"rankings_file": rankings, "reward_model_path": foreign, "run_dir": tmp_path}
    mini.stage("evaluate", mini.run, output_dir=tmp_path / "report", **changes)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    ours = json.loads((evaluated / "summary.json").read_text(encoding="utf-8"))
    assert summary["rm"]["demonstration_mean"] is None
    assert summary["policies"]["sft"]["sampled"] == ours["policies"]["sft"]["sampled"], "the judge's numbers stay"
    assert summary["policies"]["sft"]["proxy"] != ours["policies"]["sft"]["proxy"]


def test_the_penalty_follows_the_share_that_ends(mini, tmp_path):
    """By hand from the log, and taken off the answers that did not end in the iteration that it is logged for."""
    keys = {"missing_eos_mode": "subtract", "missing_eos_penalty": -0.5, "finished_target": 0.9, "reward_clip": "null"}
    mini.stage("ppo", mini.run, output_dir=tmp_path / "ppo", total_episodes=48, **keys)
    logged = rows(tmp_path / "ppo" / "metrics.jsonl")
    size, last = 0.5, 0.0
    for row in logged:
        assert row["missing_eos_penalty"] == pytest.approx(-size)
        taken = size * (1 - row["objective/finished"])
        assert row["objective/scores"] == pytest.approx(row["objective/raw_scores"] - taken, abs=1e-4)
        missing = 0.9 - row["objective/finished"]
        size, last = max(0.0, size + (missing - last) + 0.1 * missing), missing
    assert len(logged) == 3 and len({row["missing_eos_penalty"] for row in logged}) > 1
