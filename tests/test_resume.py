"""align/resume.py: what a run must share with the checkpoint that it goes on from."""

import json

import pytest

from align.checkpoint import is_finished, release_output
from align.config import BaseConfig, FunctionTerm, PPOConfig, RMConfig, SFTConfig
from align.errors import UserError
from align.resume import LORA, RATES, SHARED, start_run
from align.rows import DataReport
from tests.folders import finished, names, own_checkpoint

PARENTS = [{"role": "model_name_or_path", "path": "runs/base", "weights_sha256": "aa"}]
REPORTS = {"train_file": DataReport(("d.jsonl",), 5, 5, {"d.jsonl": "cc"})}


def sft(folder, resume=None, **changes) -> SFTConfig:
    return SFTConfig(output_dir=str(folder), resume_from_checkpoint=resume, **changes)


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run with checkpoints 1 and 2."""
    folder = tmp_path / "sft"
    assert start_run(sft(folder), PARENTS, REPORTS) == (folder, None)
    own_checkpoint(folder, 1)
    own_checkpoint(folder, 2)
    finished(folder)
    yield folder
    release_output(folder)


def test_a_run_goes_on_and_is_then_not_finished(run):
    assert start_run(sft(run, "latest"), PARENTS, REPORTS) == (run, run / "checkpoint-2")
    assert "manifest.json" not in names(run)


def test_a_checkpoint_further_back_sets_the_later_ones_aside(run):
    first = run / "checkpoint-1"
    assert start_run(sft(run, str(first)), PARENTS, REPORTS) == (run, first)
    assert {"checkpoint-1", "abandoned-checkpoint-2"} <= set(names(run)) and "checkpoint-2" not in names(run)


REFUSED = {
    "resume_from_checkpoint: none: is no folder": {"resume": "none"},
    "its learning_rate is 9.65e-06, not 0.5; set it as it was": {"learning_rate": 0.5},
    "its use_peft is false, not true": {"use_peft": True},
    "its adam_beta2 is 0.95, not 0.5": {"adam_beta2": 0.5},
    'its optim is "adamw_torch_fused", not "muon"': {"optim": "muon"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_go_on_leaves_a_finished_run_as_it_was(run, message):
    changes = {"resume": str(run / "checkpoint-1"), **REFUSED[message]}
    before = names(run)
    with pytest.raises(UserError) as failure:
        start_run(sft(run, **changes), PARENTS, REPORTS)
    assert message in str(failure.value)
    assert names(run) == before and is_finished(run, "latest")


PPO = {"reward": (FunctionTerm("a:b"),), "ptx_coef": 0}
ADAM = {"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.5, "optim": "adafactor"}
RATE = {"learning_rate": 0.5, "weight_decay": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 7}
ADAPTER = {"lora_r": 3, "lora_alpha": 7, "lora_target_modules": ("q_proj",)}
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
MUON = {"optim": "muon", "muon_learning_rate": 0.1}
COMPARED = [  # a stage, what it begins with, and each key that then may not change with another value of it
    (BaseConfig, {}, SIZES | {"seed": 1, "learning_rate": 0.5, "muon_learning_rate": 0.5, "adam_beta2": 0.5}),
    (
        SFTConfig,
        {"pretraining_file": "t.txt"},
        {"seed": 1, "max_length": 9, "pretraining_fraction": 0.5, "all_answers": True},
    ),
    (SFTConfig, {}, ADAM | {"use_peft": True}),
    (RMConfig, {}, ADAM | {"seed": 1, "max_length": 9, "batch_element": "pair"}),
    *((kind, {}, RATE) for kind in (SFTConfig, RMConfig)),
    (PPOConfig, PPO, ADAM | {"seed": 1, "max_prompt_length": 9, "rollout_batch_size": 8, "ema_decay": None}),
    (PPOConfig, PPO, {"use_peft": True, "value_use_peft": True}),
    *((kind, MUON, {"muon_learning_rate": 0.2}) for kind in (SFTConfig, RMConfig)),
    *((kind, {"use_peft": True}, ADAPTER | {"use_peft": False}) for kind in (SFTConfig, RMConfig)),
    *((PPOConfig, PPO | {name: True}, ADAPTER | {name: False}) for name in ("use_peft", "value_use_peft")),
]
CASES = [
    pytest.param(
        kind, begun, key, value, id="-".join([kind.__name__, *(name for name in begun if name not in PPO), key])
    )
    for kind, begun, changed in COMPARED
    for key, value in changed.items()
]


@pytest.mark.parametrize(("kind", "begun", "key", "value"), CASES)
def test_what_weights_optimiser_and_order_rest_on_is_refused_by_name(tmp_path, kind, begun, key, value):
    start_run(kind(output_dir=str(tmp_path), **begun), PARENTS, REPORTS)
    own_checkpoint(tmp_path, 1)
    again = {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest", **begun}
    with pytest.raises(UserError, match=f"checkpoint-1: its {key} is .*; set it as it was"):
        start_run(kind(**again | {key: value}), PARENTS, REPORTS)
    assert start_run(kind(**again), PARENTS, REPORTS) == (tmp_path, tmp_path / "checkpoint-1")
    release_output(tmp_path)


def test_a_run_that_began_before_a_key_was_there_has_its_default(tmp_path):
    start_run(RMConfig(output_dir=str(tmp_path)), PARENTS, REPORTS)
    own_checkpoint(tmp_path, 1)
    began = json.loads((tmp_path / "run.json").read_text())
    for part in ("config", "settings"):
        began[part] = {name: value for name, value in began[part].items() if name != "weight_decay"}
    (tmp_path / "run.json").write_text(json.dumps(began))
    again = {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="checkpoint-1: its weight_decay is 0.0, not 0.1; set it as it was"):
        start_run(RMConfig(**again, weight_decay=0.1), PARENTS, REPORTS)
    assert start_run(RMConfig(**again), PARENTS, REPORTS) == (tmp_path, tmp_path / "checkpoint-1")
    release_output(tmp_path)


def test_a_key_that_may_change_is_said_once(tmp_path, capsys):
    start_run(PPOConfig(output_dir=str(tmp_path), **PPO), PARENTS, REPORTS)
    own_checkpoint(tmp_path, 1)
    again = {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest", **PPO}
    for changes in (
        {},
        {"save_total_limit": 5},
        {"vllm_gpu_memory_utilization": 0.2},
    ):  # which is of how it runs, not of what it learns
        start_run(PPOConfig(**again | changes), PARENTS, REPORTS)
        assert "until here" not in capsys.readouterr().out
    for _ in range(2):
        start_run(PPOConfig(**again | {"kl_coef": 0.5}), PARENTS, REPORTS)
    assert capsys.readouterr().out.count("kl_coef: 0.02 until here, 0.5 from here on") == 1
    release_output(tmp_path)


def test_every_key_that_is_compared_has_its_case():
    assert {key for *_, changed in COMPARED for key in changed} == {*SHARED, *RATES, *LORA}


@pytest.mark.parametrize("changes", [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}])
def test_a_trainers_step_keeps_its_rows(run, changes):
    """Its place in an epoch is counted in steps. The same rows may be cut otherwise, over other processes."""
    size = RMConfig("out").per_device_train_batch_size
    config = {"output_dir": str(run / "rm"), "per_device_train_batch_size": size}
    start_run(RMConfig(**config), PARENTS, REPORTS)
    own_checkpoint(run / "rm", 1)
    again = config | {"resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match=f"its per_device_train_batch_size x .* is {size}, not "):
        start_run(RMConfig(**again | changes), PARENTS, REPORTS)
    halves = {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": 2}
    assert start_run(RMConfig(**again | halves), PARENTS, REPORTS)[1] == run / "rm" / "checkpoint-1"
    release_output(run / "rm")


def test_more_processes_make_a_trainers_step_larger(tmp_path, monkeypatch):
    """Twice as many, with half the accumulation, is the step that it began with."""
    config = {"output_dir": str(tmp_path), "per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
    start_run(RMConfig(**config), PARENTS, REPORTS)
    own_checkpoint(tmp_path, 1)
    monkeypatch.setattr("align.resume.num_processes", lambda: 2)
    again = config | {"resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="its per_device_train_batch_size x .* x processes is 24, not 48"):
        start_run(RMConfig(**again), PARENTS, REPORTS)
    halved = RMConfig(**again | {"gradient_accumulation_steps": 2})
    assert start_run(halved, PARENTS, REPORTS) == (tmp_path, tmp_path / "checkpoint-1")
    release_output(tmp_path)


OTHER_BEGINNINGS = {
    "its model_name_or_path had other weights; give what it began with": (
        [PARENTS[0] | {"weights_sha256": "bb"}],
        REPORTS,
    ),
    "its model_name_or_path had other weights": (
        [{"role": "model_name_or_path", "path": "o/n", "weights_sha256": None}],
        REPORTS,
    ),
    "its value_model_path had other weights": ([*PARENTS, PARENTS[0] | {"role": "value_model_path"}], REPORTS),
    "its train_file had other rows": (PARENTS, {"train_file": DataReport(("d.jsonl",), 5, 5, {"d.jsonl": "dd"})}),
    "its pretraining_file had other rows": (PARENTS, REPORTS | {"pretraining_file": REPORTS["train_file"]}),
}


@pytest.mark.parametrize("message", OTHER_BEGINNINGS)
def test_other_parents_or_rows_are_refused(run, message):
    with pytest.raises(UserError, match=f"checkpoint-2: {message}"):
        start_run(sft(run, "latest"), *OTHER_BEGINNINGS[message])
    assert is_finished(run, "latest")


def test_the_same_run_in_other_words_goes_on(tmp_path):
    """Keys of adapters where there is none, an optimiser by its name or by default, a moved file."""
    start_run(sft(tmp_path), PARENTS, REPORTS)
    own_checkpoint(tmp_path, 1)
    moved = {"train_file": DataReport(("moved.jsonl",), 5, 5, {"moved.jsonl": "cc"})}
    config = sft(tmp_path, "latest", lora_r=4, optim="adamw_torch_fused", num_train_epochs=9, bf16=True)
    assert start_run(config, [PARENTS[0] | {"path": "elsewhere"}], moved) == (tmp_path, tmp_path / "checkpoint-1")
    release_output(tmp_path)


def test_a_checkpoint_of_elsewhere_does_not_go_among_those_of_another_run(run, tmp_path):
    alone = own_checkpoint(tmp_path / "elsewhere", 7)
    with pytest.raises(UserError, match=f"output_dir: {run}: holds another run than that of {alone}: choose another"):
        start_run(sft(run, str(alone)), PARENTS, REPORTS)
    assert is_finished(run, "latest")


def test_a_run_of_before_there_was_a_file_goes_on_without_one(run):
    (run / "run.json").unlink()
    assert start_run(sft(run, "latest", learning_rate=0.5), PARENTS, REPORTS)[1] == run / "checkpoint-2"
    assert "run.json" not in names(run), "what it began with is not known"


def test_what_is_a_matter_of_the_config_may_change(tmp_path):
    """PPO takes its rates from the config, in every iteration."""
    reward = (FunctionTerm("a:b"),)

    def ppo(**changes) -> PPOConfig:
        return PPOConfig(output_dir=str(tmp_path), reward=reward, ptx_coef=0, **changes)

    start_run(ppo(learning_rate=1e-5), [], {})
    own_checkpoint(tmp_path, 1)
    more = ppo(learning_rate=2e-5, total_episodes=512, kl_coef=0.5, resume_from_checkpoint="latest")
    assert start_run(more, [], {}) == (tmp_path, tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match="its ema_decay is 0.992, not 0.5"):
        start_run(ppo(ema_decay=0.5, resume_from_checkpoint="latest"), [], {})
    release_output(tmp_path)


def test_a_checkpoint_on_its_own_is_taken(run, tmp_path):
    alone = own_checkpoint(tmp_path / "elsewhere", 7)
    assert start_run(sft(tmp_path / "new", str(alone), learning_rate=0.5), [], {}) == (tmp_path / "new", alone)
    assert json.loads((tmp_path / "new" / "run.json").read_text())["config"]["learning_rate"] == 0.5
    release_output(tmp_path / "new")


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"schema": 9}', '{"schema": 1, "config": 3, "parents": {}, "data": {}}']
)
def test_a_file_that_is_none_of_ours_is_named(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(
        UserError, match="run.json: is no run.json of this project .*delete it to resume without its check"
    ):
        start_run(sft(run, "latest"), PARENTS, REPORTS)


def test_latest_with_overwrite_begins_anew_where_the_run_began_otherwise(run, capsys):
    """What `make` asks of a run that was stopped, whose config may have changed since."""
    both = {"overwrite_output_dir": True}
    told = {"save_steps": 7, "report_to": "wandb", "gradient_checkpointing": True}
    assert start_run(sft(run, "latest", **both, **told), PARENTS, REPORTS) == (run, run / "checkpoint-2")
    assert start_run(sft(run, "latest", seed=1, **both), PARENTS, REPORTS) == (run, None)
    assert "its seed is 0, not 1; set it as it was: begun anew, as overwrite_output_dir says" in capsys.readouterr().out
    assert {"run.json", "run.lock"} < set(names(run)) and "metrics.jsonl" not in names(run)
    kept = {name for name in names(run) if "checkpoint" in name}
    assert kept == {"abandoned-checkpoint-1", "abandoned-checkpoint-2"}, "the old run's work is not lost"
    assert json.loads((run / "run.json").read_text())["config"]["seed"] == 1


def test_make_does_not_go_on_with_any_other_settings(run, capsys):
    """By hand more epochs may be asked of a run that was stopped; `make` redoes what changed."""
    changed = sft(run, "latest", num_train_epochs=9.0, overwrite_output_dir=True)
    assert start_run(changed, PARENTS, REPORTS) == (run, None)
    assert "its num_train_epochs is 2.0, not 9.0; set it as it was: begun anew" in capsys.readouterr().out


def test_make_goes_by_the_settings_that_the_run_was_last_continued_with(run):
    assert start_run(sft(run, "latest", num_train_epochs=9.0), PARENTS, REPORTS) == (run, run / "checkpoint-2")
    again = sft(run, "latest", num_train_epochs=9.0, overwrite_output_dir=True)
    assert start_run(again, PARENTS, REPORTS) == (run, run / "checkpoint-2")


def test_a_run_of_an_older_version_is_compared_by_what_it_knows(run):
    """Its run.json lacks keys that are compared since."""
    known = json.loads((run / "run.json").read_text())
    del known["settings"], known["config"]["seed"]
    (run / "run.json").write_text(json.dumps(known))
    assert start_run(sft(run, "latest", seed=3), PARENTS, REPORTS) == (run, run / "checkpoint-2")
