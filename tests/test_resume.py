"""align/resume.py: what a run must share with the checkpoint that it goes on from."""

import json
from types import SimpleNamespace

import pytest

from align.checkpoint import is_finished, release_output
from align.config import PPOConfig, SFTConfig
from align.errors import UserError
from align.resume import start_run
from tests.folders import finished, names, own_checkpoint

PARENTS = [
    {"role": "model_name_or_path", "weights_sha256": "aa"},
    {"role": "reward_model_path", "weights_sha256": None},
]


def sft(folder, resume=None, **changes) -> SFTConfig:
    return SFTConfig(output_dir=str(folder), resume_from_checkpoint=resume, **changes)


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run with checkpoints 1 and 2."""
    folder = tmp_path / "sft"
    assert start_run(sft(folder), PARENTS) == (folder, None)
    own_checkpoint(folder, 1)
    own_checkpoint(folder, 2)
    finished(folder)
    yield folder
    release_output(folder)


def test_a_run_goes_on_and_is_then_not_finished(run):
    assert start_run(sft(run, "latest"), PARENTS) == (run, run / "checkpoint-2")
    assert "manifest.json" not in names(run)


def test_a_checkpoint_further_back_sets_the_later_ones_aside(run):
    first = run / "checkpoint-1"
    assert start_run(sft(run, str(first)), PARENTS) == (run, first)
    assert {"checkpoint-1", "abandoned-checkpoint-2"} <= set(names(run)) and "checkpoint-2" not in names(run)


REFUSED = {
    "resume_from_checkpoint: none: is no folder": {"resume": "none"},
    "its learning_rate is 9.65e-06, not 0.5; set it as it was": {"learning_rate": 0.5},
    "its use_peft is False, not True": {"use_peft": True},
    "its lora_target_modules is [], not ['q_proj']": {"lora_target_modules": ("q_proj",)},
    "its optim is None, not muon": {"optim": "muon"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_go_on_leaves_a_finished_run_as_it_was(run, message):
    changes = {"resume": str(run / "checkpoint-1"), **REFUSED[message]}
    before = names(run)
    with pytest.raises(UserError) as failure:
        start_run(sft(run, **changes), PARENTS)
    assert message in str(failure.value)
    assert names(run) == before and is_finished(run, "latest")


def test_another_parent_is_refused(run):
    other = [PARENTS[0] | {"weights_sha256": "bb"}, PARENTS[1]]
    with pytest.raises(UserError, match="checkpoint-2: its model_name_or_path had other weights: give the one"):
        start_run(sft(run, "latest"), other)
    assert is_finished(run, "latest")


def test_what_is_a_matter_of_the_config_may_change(tmp_path):
    """PPO takes its rates from the config, in every iteration."""
    reward = (SimpleNamespace(name="r", function="a:b", model=None),)

    def ppo(**changes) -> PPOConfig:
        return PPOConfig(output_dir=str(tmp_path), reward=reward, ptx_coef=0, **changes)

    start_run(ppo(learning_rate=1e-5))
    own_checkpoint(tmp_path, 1)
    more = ppo(learning_rate=2e-5, total_episodes=512, kl_coef=0.5, resume_from_checkpoint="latest")
    assert start_run(more) == (tmp_path, tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match="its ema_decay is 0.992, not 0.5"):
        start_run(ppo(ema_decay=0.5, resume_from_checkpoint="latest"))
    release_output(tmp_path)


def test_a_checkpoint_on_its_own_is_taken(run, tmp_path):
    alone = own_checkpoint(tmp_path / "elsewhere", 7)
    assert start_run(sft(tmp_path / "new", str(alone), learning_rate=0.5)) == (tmp_path / "new", alone)
    assert json.loads((tmp_path / "new" / "run.json").read_text())["config"]["learning_rate"] == 0.5
    release_output(tmp_path / "new")


def test_a_torn_file_is_named(run):
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json: cannot be read .*remove it to resume without its check"):
        start_run(sft(run, "latest"), PARENTS)
