"""What stages 1 and 2 give their Trainer: the config's keys, rows, a model; which checkpoints it keeps."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import stages.rm
import stages.sft
from align.checkpoint import release_output
from align.config import RMConfig, SFTConfig
from align.trainer import DemonstrationTrainer, RankingTrainer
from align.types import Ranking
from tests.folders import lines

KEYS = {
    "seed": 3, "logging_steps": 7, "save_total_limit": 5, "save_steps": 9, "max_grad_norm": 0.3,
    "num_train_epochs": 4.0, "learning_rate": 2e-4, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 8,
    "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-3, "weight_decay": 0.2, "lr_scheduler_type": "linear",
    "warmup_steps": 13,
}  # fmt: skip
OWN = [
    (stages.sft, SFTConfig, {"max_length": 55, "completion_only_loss": False}, {"per_device_eval_batch_size": 6}),
    (stages.rm, RMConfig, {"per_device_eval_batch_size": 11, "eval_steps": 17}, {}),
]


@pytest.mark.parametrize(("stage", "kind", "own", "follows"), OWN, ids=["sft", "rm"])
def test_the_configs_keys_are_the_trainers(tmp_path, stage, kind, own, follows):
    """Each under its own name."""
    args = stage.training_arguments(kind(output_dir="out", **KEYS, **own), tmp_path)
    expected = KEYS | own | follows | {"data_seed": 3, "output_dir": str(tmp_path)}
    assert {name: getattr(args, name) for name in expected} == expected


class Stopped(Exception):
    """In place of the training."""


@pytest.fixture
def given(monkeypatch) -> list:
    """The Trainers that were to train."""
    made = []

    def train(self, resume_from_checkpoint=None):
        made.append(self)
        raise Stopped

    for kind in (DemonstrationTrainer, RankingTrainer):
        monkeypatch.setattr(kind, "train", train)
    return made


@pytest.fixture
def base(tiny_codec, tmp_path) -> Path:
    """A GPT-2 with dropout of 0.1 everywhere, and its tokenizer."""
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tiny_codec.tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=None,
            eos_token_id=tiny_codec.eos_id, pad_token_id=tiny_codec.pad_id,
        )
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    tiny_codec.save(tmp_path / "base")
    return tmp_path / "base"


def flags(**values) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_the_epoch_is_chosen_by_rows_that_were_held_out(base, given, tiny_codec, tmp_path):
    files = {
        "train_file": lines(tmp_path / "train.jsonl", {"prompt": "hot", "completion": "cold"}),
        "validation_file": lines(tmp_path / "validation.jsonl", {"prompt": "a cow", "completion": "a dog"}),
    }
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        stages.sft.main(flags(model_name_or_path=base, output_dir=out, max_length=64, bf16="false", **files))
    release_output(out)
    (trainer,) = given
    learned, held = tiny_codec.prompt("hot") + tiny_codec.response("cold"), tiny_codec.prompt("a cow")
    assert list(trainer.train_dataset["input_ids"]) == [learned]
    assert list(trainer.eval_dataset["input_ids"]) == [held + tiny_codec.response("a dog")]


def test_a_reward_model_trains_without_dropout_and_is_measured_on_held_out_rankings(base, given, tiny_codec, tmp_path):
    config = RMConfig(output_dir=str(tmp_path / "out"), model_name_or_path=str(base), eval_steps=1)
    train, held = (Ranking(prompt, ("cold", "a dog"), (0.0, 1.0)) for prompt in ("hot", "a cow"))
    with pytest.raises(Stopped):
        stages.rm.train(config, tiny_codec, [train], [held], tmp_path / "out", None)
    (trainer,) = given
    rates = [module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(rates) > 3 and set(rates) == {0.0}
    assert [element["ranking"].query for element in trainer.train_dataset] == [tuple(tiny_codec.prompt("hot"))]
    assert [element["ranking"].query for element in trainer.eval_dataset] == [tuple(tiny_codec.prompt("a cow"))]


def test_a_reward_model_learns_from_no_prompt_that_it_is_tested_on(base, tiny_codec, tmp_path):
    """Neither those of the validation rankings nor those that other labelers ranked."""

    def ranked(prompt: str) -> dict:
        return {"prompt": prompt, "completions": [{"completion": text, "rank": i} for i, text in enumerate("ab")]}

    config = RMConfig(
        output_dir=str(tmp_path / "out"), model_name_or_path=str(base), on_bad_rows="drop",
        train_file=lines(tmp_path / "train.jsonl", ranked("hot"), ranked("cow"), ranked("fox")),
        validation_file=lines(tmp_path / "validation.jsonl", ranked("cow")),
        held_out_file=lines(tmp_path / "held.jsonl", ranked("fox")),
    )  # fmt: skip
    rankings, held, reports = stages.rm.load_all(config, tiny_codec, 64)
    assert [ranking.prompt for ranking in rankings] == ["hot"]
    assert {name: [row.prompt for row in rows] for name, rows in held.items()} == {
        "validation": ["cow"], "held_out_labelers": ["fox"]
    }  # fmt: skip
    assert reports["train_file"].dropped == {"in_two_splits": 2}
