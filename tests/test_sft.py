"""Stage 1's batch and loss as the stage makes them, token by token; and that its helpers are called."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import stages.sft
from align.config import SFTConfig
from align.data import load_demonstrations
from align.demonstrations import demonstration_rows, every_answer
from align.packing import PackCollator
from align.rows import DataReport
from align.select import choose_epoch
from align.text import Codec
from align.trainer import DemonstrationTrainer, OwnDropout, SaveEachEpoch, causal_collator
from align.types import Demonstration
from tests.folders import lines

DEMONSTRATIONS = [
    Demonstration("Name three animals that live on a farm.", "a cow, a dog and a bird"),
    Demonstration("用中文说出三种水果。", "苹果、香蕉和梨。"),
    Demonstration("hot", "cold"),
]


def test_labels_of_a_pack_by_hand():
    """A row's first token is predicted from nothing; a row without labels learns all else."""
    rows = [
        {"input_ids": [5, 6, 7, 1], "labels": [-100, -100, 7, 1]}, {"input_ids": [8, 9], "labels": [-100, 9]},
        {"input_ids": [3, 4]},
    ]  # fmt: skip
    batch = PackCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 8, 9, 3, 4]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 1, -100, 9, -100, 4]]
    assert int(batch["attention_mask"].sum()) == 8, "TRL counts the tokens it has seen by it"
    assert int(PackCollator(0)([*rows, {"input_ids": [2], "filler": True}])["attention_mask"].sum()) == 8


@pytest.fixture(params=[None, "eager"], ids=["packed", "padded"])
def attention(request):
    return request.param


def trainer_of(codec, folder, attention, **changes) -> DemonstrationTrainer:
    """As `stages.sft` builds it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(codec.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, pad_token_id=codec.pad_id, eos_token_id=codec.eos_id, bos_token_id=None,
            attn_implementation="eager",
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    config = SFTConfig(
        output_dir=str(folder), model_name_or_path="m", max_length=200, per_device_train_batch_size=3,
        attn_implementation=attention, **changes,
    )  # fmt: skip
    rows, _ = demonstration_rows(DEMONSTRATIONS, codec, 200, DataReport(("x",), 3, 3, {}))
    return DemonstrationTrainer(
        model=model, config=config, args=stages.sft.training_arguments(config, folder),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        data_collator=causal_collator(model, attention, codec.pad_id), processing_class=codec.tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("prompt_too", [False, True])
def test_S2_the_stages_loss_is_that_of_its_tokens_one_by_one(tiny_codec, tmp_path, attention, prompt_too):
    """EOS learned, each row by itself, the prompt only where it is asked for; the same for the validation loss, which
    chooses the epoch."""
    trainer = trainer_of(tiny_codec, tmp_path, attention, completion_only_loss=not prompt_too)
    assert isinstance(trainer.data_collator, PackCollator) == (attention is None)
    model = copy.deepcopy(trainer.model).eval()
    model.set_attn_implementation("eager")
    costs = []
    for row in DEMONSTRATIONS:
        query, ids = tiny_codec.prompt(row.prompt), tiny_codec.prompt(row.prompt) + tiny_codec.response(row.completion)
        assert ids[-1] == tiny_codec.eos_id
        with torch.no_grad():
            table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        costs += [-float(table[t - 1, ids[t]]) for t in range(1 if prompt_too else len(query), len(ids))]
    expected = sum(costs) / len(costs)
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(expected, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_every_epoch_stays_until_one_is_chosen(tiny_codec, tmp_path):
    """Whatever number of checkpoints is kept to resume from."""
    trainer = trainer_of(tiny_codec, tmp_path, None, num_train_epochs=3.0, save_total_limit=2)
    trainer.add_callback(SaveEachEpoch())
    trainer.train()
    choice = choose_epoch(tmp_path, trainer.state.log_history, [], trainer.config, tiny_codec)
    assert [row["checkpoint"] for row in choice["table"]] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [row["epoch"] for row in choice["table"]] == [1.0, 2.0, 3.0]


def test_S6_the_stages_rows_hold_their_share_of_text(tiny_codec, tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    for name, rows in {
        "train": [{"prompt": f"hot {i}", "completion": "cold"} for i in range(6)],
        "validation": [{"prompt": "the red one", "completion": "boat"}],
        "text": [{"text": f"a cow and a dog {i}"} for i in range(9)],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = SFTConfig(
        output_dir=str(tmp_path / "out"), model_name_or_path=str(tmp_path / "base"), pretraining_fraction=0.25,
        train_file=str(tmp_path / "train.jsonl"), validation_file=str(tmp_path / "validation.jsonl"),
        pretraining_file=str(tmp_path / "text.jsonl"), max_length=100,
    )  # fmt: skip
    train, validation, reports = stages.sft.load_rows(config, tiny_codec)
    whole = [row for row in train if 0 not in row["completion_mask"]]
    assert (len(train), len(whole), len(validation)) == (8, 2, 1) and "pretraining_file" in reports


def said(role: str, text: str, **more) -> dict:
    return {"role": role, "content": text, **more}


def test_every_answer_is_a_row_behind_what_was_said_before_it(tmp_path):
    system, one, two = said("system", "be kind"), said("user", "hi"), said("user", "and now?")
    first, second = said("assistant", "hello"), said("assistant", "good night")
    call = said("assistant", "I look.", tool_calls=[{"id": 1}])
    talks = [
        {"messages": [system, one, first, two, second]},
        {"messages": [system, one, first, said("user", "bye"), second]},  # the first answer again
        {"prompt": [first, one, call, said("tool", "21"), said("assistant", "warm"), two], "completion": [second]},
        {"prompt": "p", "completion": "c"},
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
    rows, report = every_answer(*load_demonstrations(str(path)))
    assert every_answer(rows, report)[0] == rows, "an earlier answer that is a row's own is not learned twice"
    found = [(len(row.prompt), row.completion) for row in rows]
    warm = (talks[2]["prompt"][4],)
    assert found == [(2, (first,)), (4, (second,)), (4, (second,)), (4, warm), (6, (second,)), (1, "c")]
    assert rows[0].prompt == (system, one)
    assert (report.rows_read, report.rows_used, report.notes) == (6, 6, {"earlier_answers": 2})


def test_an_earlier_answer_to_a_held_out_prompt_is_not_learned(tiny_codec, tiny_llama, tmp_path):
    """Two conversations that differ begin with the same question."""
    tiny_llama.save_pretrained(tmp_path / "base")
    hi, more = said("user", "hi"), said("user", "and now?")
    train = [
        {"messages": [hi, said("assistant", "hello"), more, said("assistant", "good night")]},
        {"messages": [said("user", "hot"), said("assistant", "cold")]},
    ]
    held = [{"messages": [hi, said("assistant", "good day"), more, said("assistant", "good bye")]}]
    config = SFTConfig(
        output_dir=str(tmp_path / "out"), model_name_or_path=str(tmp_path / "base"), all_answers=True, max_length=100,
        train_file=lines(tmp_path / "train.jsonl", *train), validation_file=lines(tmp_path / "held.jsonl", *held),
    )  # fmt: skip
    train, validation, reports = stages.sft.load_rows(config, tiny_codec)

    def answers(rows: list[dict]) -> list[str]:
        return [tiny_codec.decode(row["input_ids"][row["completion_mask"].index(1) :]) for row in rows]

    assert (answers(train), answers(validation)) == (["good night", "cold"], ["good day", "good bye"])
    assert reports["train_file"].dropped == {"in_two_splits": 1}


@pytest.mark.parametrize(
    ("prompt", "completion", "warned"), [("p", "c", True), ("p\n", "c", False), ("p", " c", False)]
)
def test_a_base_model_is_warned_of_answers_glued_to_their_prompts(tiny_codec, capsys, prompt, completion, warned):
    tokenizer = copy.deepcopy(tiny_codec.tokenizer)
    tokenizer.chat_template = None
    rows = [Demonstration(prompt, completion)] * 3
    for codec in (Codec(tokenizer), tiny_codec):
        demonstration_rows(rows, codec, 99, DataReport(("f",), 3, 3, {}))
        assert ("no white space stands between prompt and answer in 3 rows" in capsys.readouterr().out) == warned
        warned = False  # a template parts the two


def test_processes_draw_their_own_dropout_and_the_first_that_of_a_run_alone():
    def draws(process: int) -> list[float]:
        torch.manual_seed(11)
        OwnDropout().on_train_begin(SimpleNamespace(seed=0, process_index=process), None, None)
        return torch.rand(4).tolist()

    torch.manual_seed(11)
    alone = torch.rand(4).tolist()
    assert draws(0) == alone and draws(1) == draws(1)
    assert len({tuple(draws(process)) for process in range(4)}) == 4
