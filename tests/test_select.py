"""align/select.py, the learning rate of SFT, and the pretraining share of its rows."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch
from transformers import Trainer, TrainerCallback

import align.select
import stages.rm
import stages.sft
from align.checkpoint import mark_complete
from align.config import RMConfig, SFTConfig
from align.demonstrations import mix_pretraining
from align.errors import UserError
from align.select import choose_epoch, load_scorer, mean_reward, pick, selection_prompts

LOG = [
    {"step": 5, "epoch": 1.0, "loss": 3.0},
    {"step": 5, "epoch": 1.0, "eval_loss": 2.0},
    {"step": 10, "epoch": 2.0, "eval_loss": 1.0},
    {"step": 15, "epoch": 3.0, "eval_loss": 1.5},
]


@pytest.fixture
def output(tmp_path):
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"whole")
        mark_complete(tmp_path / f"checkpoint-{step}")
    return tmp_path


def config_of(output, **changes) -> SFTConfig:
    return SFTConfig(output_dir=str(output / "out"), model_name_or_path="m", **changes)


def test_S5_the_highest_mean_reward_wins_though_its_loss_is_worse(output, monkeypatch):
    rewards = {"checkpoint-5": 0.3, "checkpoint-10": -1.0, "checkpoint-15": 0.1}
    monkeypatch.setattr(align.select, "mean_reward", lambda path, *rest: rewards[path.rsplit("/", 1)[1]])
    monkeypatch.setattr(align.select, "load_scorer", lambda *_: None)
    choice = choose_epoch(output, LOG, [], config_of(output, reward_model_path="rm"), codec=None)
    assert choice["checkpoint"] == "checkpoint-5" and choice["criterion"] == "highest mean reward"
    assert [(row["reward"], row["validation_loss"]) for row in choice["table"]] == [(0.3, 2.0), (-1.0, 1.0), (0.1, 1.5)]


def test_without_a_reward_model_the_lowest_loss_wins(output):
    choice = choose_epoch(output, LOG, [], config_of(output), codec=None)
    assert choice["checkpoint"] == "checkpoint-10" and choice["criterion"] == "lowest validation loss"
    assert [row["epoch"] for row in choice["table"]] == [1.0, 2.0, 3.0]


def test_only_whole_checkpoints_are_chosen(output, capsys):
    (output / "checkpoint-10" / "weights").write_bytes(b"whale")
    assert choose_epoch(output, LOG, [], config_of(output), codec=None)["checkpoint"] == "checkpoint-15"
    assert f"warning: {output}/checkpoint-10: weights changed: not chosen from" in capsys.readouterr().out
    shutil.rmtree(output / "checkpoint-15")
    assert choose_epoch(output, LOG, [], config_of(output), codec=None)["checkpoint"] == "checkpoint-5"
    with pytest.raises(UserError, match="no checkpoint to choose from"):
        choose_epoch(output / "elsewhere", LOG, [], config_of(output), codec=None)


def test_pick_takes_the_earlier_of_equals():
    table = [{"checkpoint": name, "validation_loss": 1.0, "reward": 2.0} for name in ("a", "b")]
    assert pick(table)["checkpoint"] == "a"
    assert pick([{k: v for k, v in row.items() if k != "reward"} for row in table])["checkpoint"] == "a"
    mixed = [{"checkpoint": "a", "validation_loss": 2.0, "reward": 9.0}, {"checkpoint": "b", "validation_loss": 1.0}]
    assert pick(mixed)["checkpoint"] == "b", "rewards count only where every epoch has one"


def test_S5_mean_reward_samples_the_checkpoint_and_scores_it(tiny_codec, tmp_path):
    """Against generation and scoring by hand: greedy, so that transformers' generate is the oracle."""
    from transformers import AutoModelForTokenClassification, LlamaConfig, LlamaForCausalLM

    from align.models import load_scalar_model, save_scalar_model

    config = LlamaConfig(
        vocab_size=len(tiny_codec.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=tiny_codec.pad_id, eos_token_id=tiny_codec.eos_id, bos_token_id=None,
    )  # fmt: skip
    policy = LlamaForCausalLM(config).eval()
    policy.save_pretrained(tmp_path / "policy")
    scalar = load_scalar_model(str(tmp_path / "policy"), fresh_head=True)
    with torch.no_grad():
        scalar.head.bias.fill_(-0.3)
    save_scalar_model(scalar, tmp_path / "rm", tiny_codec.pad_id)
    prompts = ["hot", "a cow", "三种水果"]
    rows = "".join(f'{{"prompt": "{p}", "completion": "x"}}\n' for p in prompts)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    settings = config_of(
        tmp_path, reward_model_path=str(tmp_path / "rm"), validation_file=str(tmp_path / "rows.jsonl"),
        max_new_tokens=5, temperature=0.0, selection_prompts=2,
    )  # fmt: skip
    judge = AutoModelForTokenClassification.from_pretrained(tmp_path / "rm")
    total = 0.0
    for prompt in prompts[:2]:
        ids = policy.generate(torch.tensor([tiny_codec.prompt(prompt)]), max_new_tokens=5, do_sample=False)
        if ids[0, -1] != tiny_codec.eos_id:  # cut off: read as if it ended there
            ids = torch.cat([ids, torch.tensor([[tiny_codec.eos_id]])], 1)
        total += float(judge(ids).logits[0, -1, 0].detach())
    reward = load_scorer(settings, tiny_codec)
    assert mean_reward(str(tmp_path / "policy"), reward, prompts[:2], settings, tiny_codec) == pytest.approx(
        total / 2, abs=1e-4
    )


def test_S5_a_reward_model_with_another_tokenizer_reads_the_text(tiny_codec, tmp_path):
    """Its tokens are bytes, its prompt format and EOS are its own; transformers generates and scores as the oracle."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    other = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="</s>")
    other.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}</s>{% else %} / {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )

    def config(size: int, **changes) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=None, eos_token_id=tiny_codec.eos_id, **changes,
        )  # fmt: skip

    policy = LlamaForCausalLM(config(len(tiny_codec.tokenizer))).eval()
    policy.save_pretrained(tmp_path / "policy")
    judge = LlamaForSequenceClassification(config(len(other), num_labels=1)).eval()
    judge.save_pretrained(tmp_path / "rm")
    other.save_pretrained(tmp_path / "rm")
    prompts = ["hot", "a cow", "三种水果"]
    rows = "".join(f'{{"prompt": "{p}", "completion": "x"}}\n' for p in prompts)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    settings = config_of(
        tmp_path, reward_model_path=str(tmp_path / "rm"), validation_file=str(tmp_path / "rows.jsonl"),
        max_new_tokens=5, temperature=0.0,
    )  # fmt: skip
    total = 0.0
    for prompt in prompts:
        query = tiny_codec.prompt(prompt)
        ids = policy.generate(torch.tensor([query]), max_new_tokens=5, do_sample=False)[0, len(query) :].tolist()
        answer = f"user: {prompt} / assistant: {tiny_codec.decode(ids)}</s>"
        tokens = other(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        total += float(judge(tokens).logits[0, 0].detach())
    reward = load_scorer(settings, tiny_codec)
    assert mean_reward(str(tmp_path / "policy"), reward, prompts, settings, tiny_codec) == pytest.approx(
        total / 3, abs=1e-4
    )


class Rates(TrainerCallback):
    def __init__(self):
        self.used = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.used.append(optimizer.param_groups[0]["lr"])


class Line(torch.nn.Module):
    """Its gradient is 1 always: Adam's step is the rate."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * x).sum()}


def trained_line(stage: str, tmp_path, steps: int, **keys) -> tuple[Trainer, list[float]]:
    """A Trainer with the arguments that the stage makes of `keys`, after so many steps, and the rate of each."""
    module, kind = {"sft": (stages.sft, SFTConfig), "rm": (stages.rm, RMConfig)}[stage]
    common = {"model_name_or_path": "m", "num_train_epochs": 1.0, "per_device_train_batch_size": 1, "bf16": False}
    args = module.training_arguments(kind(str(tmp_path), **common, **keys), tmp_path)
    args.eval_strategy, args.train_sampling_strategy = "no", "random"
    rates, data = Rates(), [{"x": torch.ones(1)} for _ in range(steps)]
    trainer = Trainer(model=Line(), args=args, train_dataset=data, callbacks=[rates])
    trainer.train()
    return trainer, rates.used


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_S3_learning_rate_starts_at_its_peak_and_ends_at_a_tenth(stage, tmp_path):
    """The scheduler that transformers makes of the stage's arguments, as the optimiser meets it."""
    trainer, used = trained_line(stage, tmp_path, 50, learning_rate=1e-3)
    expected = [1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 50))) for step in range(50)]
    assert len(used) == 50 and used[0] == 1e-3, "no warm-up"
    assert used == pytest.approx(expected, rel=1e-6)
    assert used == sorted(used, reverse=True) and used[-1] == pytest.approx(1e-4, rel=0.02)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("stage", ["sft", "rm"])
@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"lr_scheduler_type": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.5}, [0, 1 / 3, 2 / 3, 1, 1, 1]),  # half of six steps
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0, 1 / 2, 1, 1, 1, 1]),
        ({"lr_scheduler_type": "cosine"}, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_other_schedules_are_transformers_own(stage, tmp_path, keys, shares):
    assert trained_line(stage, tmp_path, 6, learning_rate=1e-3, **keys)[1] == pytest.approx(
        [1e-3 * share for share in shares], abs=1e-9
    )


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_weights_decay_where_that_is_asked_for(stage, tmp_path):
    """By hand: w <- w - rate x decay x w, then Adam's step of the rate."""
    keys = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "adam_epsilon": 1e-12}
    for decay, expected in ((0.0, 1 - 3 * 0.1), (0.5, ((1 * 0.95 - 0.1) * 0.95 - 0.1) * 0.95 - 0.1)):
        trainer, _ = trained_line(stage, tmp_path / str(decay), 3, weight_decay=decay, **keys)
        assert float(trainer.model.weight.detach()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_S6_pretraining_share(tiny_codec, fraction):
    rows = [{"input_ids": [5, 1], "completion_mask": [0, 1]} for _ in range(900)]
    texts = [f"{i} document" for i in range(3000)]
    mixed = mix_pretraining(rows, texts, fraction, tiny_codec, 6, seed=1)
    drawn = mixed[900:]
    assert mixed[:900] == rows and len(drawn) / len(mixed) == pytest.approx(fraction, abs=1e-3)
    assert all(row["completion_mask"] == [1] * len(row["input_ids"]) and len(row["input_ids"]) <= 6 for row in drawn)
    assert drawn == mix_pretraining(rows, texts, fraction, tiny_codec, 6, seed=1)[900:]
    assert drawn != mix_pretraining(rows, texts, fraction, tiny_codec, 6, seed=2)[900:]


def test_S6_documents_repeat_only_when_they_run_out(tiny_codec):
    rows = [{"input_ids": [5, 1], "completion_mask": [0, 1]} for _ in range(10)]
    texts = ["cow", "dog", "bird", "fox"]
    assert mix_pretraining(rows, texts, 0.0, tiny_codec, 9, 0) is rows
    few = mix_pretraining(rows, texts, 3 / 13, tiny_codec, 9, 0)[10:]
    assert len({tuple(row["input_ids"]) for row in few}) == 3
    many = Counter(tuple(row["input_ids"]) for row in mix_pretraining(rows, texts, 0.5, tiny_codec, 9, 0)[10:])
    assert many.total() == 10 and len(many) == 4


def test_S5_prompts_without_room_for_an_answer_are_not_sampled_from(tiny_codec, tmp_path, monkeypatch):
    """A context of 8: of the two prompts, one has room for an answer of 3 tokens."""
    rows = [{"prompt": "hot", "completion": "x"}, {"prompt": "a cow and a dog and a bird", "completion": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lengths = [len(tiny_codec.prompt(row["prompt"])) for row in rows]
    settings = config_of(
        tmp_path, reward_model_path="rm", validation_file=str(tmp_path / "rows.jsonl"), max_new_tokens=3
    )
    asked = []
    monkeypatch.setattr(align.select, "context_of", lambda path: lengths[0] + 3)
    monkeypatch.setattr(align.select, "load_packed_policy", lambda *how: torch.nn.Identity())
    monkeypatch.setattr(align.select, "make_sampler", lambda *how: lambda queries, *rest: asked.extend(queries))
    monkeypatch.setattr(
        align.select, "load_reward", lambda *how, **more: lambda prompts, episodes: [0.5] * len(prompts)
    )
    prompts = selection_prompts("policy", settings, tiny_codec)
    assert mean_reward("policy", load_scorer(settings, tiny_codec), prompts, settings, tiny_codec) == 0.5
    assert asked == [tiny_codec.prompt("hot")] and lengths[1] > lengths[0]
    monkeypatch.setattr(align.select, "context_of", lambda path: 3)
    with pytest.raises(UserError, match="max_new_tokens: no validation prompt leaves room for 3: lower"):
        selection_prompts("policy", settings, tiny_codec)
