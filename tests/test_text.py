"""align/text.py, align/demonstrations.py and the SFT rows as TRL's trainer sees them."""

import copy

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTTrainer

import stages.base
import stages.sft
from align.config import SFTConfig
from align.demonstrations import demonstration_rows
from align.errors import UserError
from align.rows import DataReport
from align.text import CausalCollator, Codec
from align.types import Demonstration

DEMONSTRATIONS = [
    Demonstration("Name three animals that live on a farm.", "a cow, a dog and a bird"),
    Demonstration("用中文说出三种水果。", "苹果、香蕉和梨。"),
    Demonstration("hot", "cold"),
]
REPORT = DataReport(("rows.jsonl",), 3, 3, {})


@pytest.fixture(scope="module")
def world_codec() -> Codec:
    texts = [f"{d.prompt}\n{d.completion}" for d in DEMONSTRATIONS]
    return Codec(stages.base.train_tokenizer(texts, 300))


def model_for(codec: Codec) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(codec.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=codec.pad_id, eos_token_id=codec.eos_id, bos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sft_trainer(codec, tmp_path, **changes) -> SFTTrainer:
    """Built as the stage builds it."""
    config = SFTConfig(
        output_dir=str(tmp_path), model_name_or_path="m", max_length=200, per_device_train_batch_size=3, **changes
    )
    rows, _ = demonstration_rows(DEMONSTRATIONS, codec, 200, REPORT)
    return SFTTrainer(
        model=model_for(codec),
        args=stages.sft.training_arguments(config, tmp_path),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=codec.tokenizer,
    )


def labelled(batch) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of each row of a batch, padding taken off by the attention mask or by the labels' end."""
    out = []
    for i in range(batch["input_ids"].shape[0]):
        ids, labels = batch["input_ids"][i].tolist(), batch["labels"][i].tolist()
        length = int(batch["attention_mask"][i].sum()) if "attention_mask" in batch else len(ids)
        assert set(labels[length:]) <= {-100}, "padding is never learned"
        out.append((ids[:length], labels[:length]))
    return sorted(out)


def test_S2_eos_is_learned_and_the_prompt_is_not(tiny_codec, tmp_path):
    batch = next(iter(sft_trainer(tiny_codec, tmp_path).get_train_dataloader()))
    expected = []
    for d in DEMONSTRATIONS:
        query, response = tiny_codec.prompt(d.prompt), tiny_codec.response(d.completion)
        assert response[-1] == tiny_codec.eos_id
        expected.append((query + response, [-100] * len(query) + response))
    assert labelled(batch) == sorted(expected)


def test_S2_the_flag_learns_the_prompt_too(tiny_codec, tmp_path):
    batch = next(iter(sft_trainer(tiny_codec, tmp_path, completion_only_loss=False).get_train_dataloader()))
    for ids, labels in labelled(batch):
        assert ids == labels and ids[-1] == tiny_codec.eos_id


def naive_loss(model, codec) -> float:
    total, count = 0.0, 0
    for d in DEMONSTRATIONS:
        query, response = codec.prompt(d.prompt), codec.response(d.completion)
        with torch.no_grad():
            logps = model(torch.tensor([query + response])).logits[0].double().log_softmax(-1)
        for r, token in enumerate(response):
            total, count = total - float(logps[len(query) - 1 + r, token]), count + 1
    return total / count


def test_S2_the_trainers_loss_is_the_mean_over_response_tokens(tiny_codec, tmp_path):
    trainer = sft_trainer(tiny_codec, tmp_path)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(naive_loss(trainer.model.eval(), tiny_codec), abs=1e-5)


def test_S1_ids_under_the_mask_and_extra_padding_change_no_loss(tiny_codec, tmp_path):
    trainer = sft_trainer(tiny_codec, tmp_path)
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))

    def gradient(inputs):
        model.zero_grad()
        loss = trainer.compute_loss(model, batch | inputs)
        loss.backward()
        return float(loss), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, plain = gradient(batch)
    wider = {
        name: torch.nn.functional.pad(value, (0, 5), value={"labels": -100, "input_ids": 77}.get(name, 0))
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    other, padded = gradient(wider)
    assert other == pytest.approx(loss, abs=1e-6) and float((plain - padded).abs().max()) < 1e-6


@pytest.mark.parametrize("conversation", [False, True])
def test_S2_a_training_sequence_starts_with_the_sampled_one(tiny_codec, world_codec, conversation):
    for codec in (tiny_codec, world_codec):
        for d in DEMONSTRATIONS:
            prompt = ({"role": "user", "content": d.prompt},) if conversation else d.prompt
            rows, _ = demonstration_rows([Demonstration(prompt, d.completion)], codec, 200, REPORT)
            query = codec.prompt(prompt)
            assert rows[0]["input_ids"][: len(query)] == query and codec.prompts([prompt, "x"])[0] == query
            assert rows[0]["completion_mask"] == [0] * len(query) + [1] * (len(rows[0]["input_ids"]) - len(query))
            assert codec.decode(rows[0]["input_ids"][len(query) :]) == d.completion


def test_the_query_is_the_chat_templates(world_codec):
    tokenizer = world_codec.tokenizer
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hot"}, {"role": "assistant", "content": "cold"}], tokenize=False
    )
    ids = world_codec.prompt("hot") + world_codec.response("cold")
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole == "<bos>hot\ncold<eos>"


def test_long_rows_are_dropped_and_counted_never_cut(tiny_codec):
    lengths = [len(tiny_codec.prompt(d.prompt) + tiny_codec.response(d.completion)) for d in DEMONSTRATIONS]
    rows, report = demonstration_rows(DEMONSTRATIONS, tiny_codec, max(lengths) - 1, REPORT)
    assert sorted(len(row["input_ids"]) for row in rows) == sorted(n for n in lengths if n < max(lengths))
    assert report.dropped == {"too_long": 3 - len(rows)} and report.rows_used == len(rows)
    with pytest.raises(UserError, match="max_length"):
        demonstration_rows(DEMONSTRATIONS, tiny_codec, 2, REPORT)


def test_D3_pad_is_not_eos_in_the_embedded_tokenizer(world_codec, tmp_path):
    world_codec.save(tmp_path)
    for codec in (world_codec, Codec.load(str(tmp_path))):
        assert codec.pad_id != codec.eos_id
        ids = codec.responses([d.completion for d in DEMONSTRATIONS]) + codec.documents(["some text", "文字"])
        assert all(row.count(codec.eos_id) == 1 and row[-1] == codec.eos_id for row in ids)
        assert all(codec.pad_id not in row for row in ids)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_a_round_trip(text):
    codec = _round_trip_codec()
    if any(special in text for special in ("<eos>", "<pad>", "<bos>")):
        return
    assert codec.decode(codec.response(text)) == text


_codecs: list[Codec] = []


def _round_trip_codec() -> Codec:
    if not _codecs:
        _codecs.append(Codec(stages.base.train_tokenizer(["苹果、香蕉和梨。", "a cow, a dog ."], 280)))
    return _codecs[0]


@pytest.mark.parametrize("text", ["  two  spaces . ", "don 't", "苹果、香蕉和梨。", "🦊 fox", "a\n\nb\t", " ,x ."])
def test_round_trip_after_saving(world_codec, tmp_path, text):
    world_codec.save(tmp_path)
    for codec in (world_codec, Codec.load(str(tmp_path))):
        assert codec.decode(codec.response(text)) == text


def test_decoding_stops_at_the_first_eos(world_codec):
    ids = world_codec.response("cold")
    assert world_codec.decode([*ids, *world_codec.response("hot")]) == "cold" and world_codec.decode([]) == ""


def test_control_tokens_that_a_policy_samples_are_no_text(world_codec):
    bos, pad = world_codec.tokenizer.bos_token_id, world_codec.pad_id
    ids = world_codec.response("cold")
    assert len({bos, pad, world_codec.eos_id}) == 3 and world_codec.decode([pad, bos, *ids[:-1], pad]) == "cold"


def test_D3_eos_written_inside_a_text_does_not_end_it(world_codec):
    """A completion that spells the EOS token must not hold two of them."""
    assert world_codec.response("a <eos> b").count(world_codec.eos_id) == 1


def test_a_tokenizer_without_pad_or_eos(tiny_codec):
    backend = tiny_codec.tokenizer.backend_tokenizer
    with pytest.raises(UserError, match="no EOS"):
        Codec(PreTrainedTokenizerFast(tokenizer_object=backend))
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))
    assert codec.pad_id == codec.eos_id
    assert codec.prompt("hot") == codec.tokenizer("hot")["input_ids"]
    with pytest.raises(UserError, match="chat template"):
        codec.prompt(({"role": "user", "content": "hot"},))


def test_few_shot_prefix(world_codec):
    ids = world_codec.few_shot([("hot", "cold"), ("cow", "dog")], ["fox"])
    assert world_codec.tokenizer.decode(ids[0]) == "<bos>hot\ncold\n\ncow\ndog\n\nfox\n"


def test_a_special_token_spelled_in_an_example_stays_text(world_codec):
    (ids,) = world_codec.few_shot([("hot <eos>", "cold <eos><bos>")], ["fox"])
    assert world_codec.eos_id not in ids and ids.count(world_codec.tokenizer.bos_token_id) == 1
    assert world_codec.tokenizer.decode(ids) == "<bos>hot <eos>\ncold <eos><bos>\n\nfox\n"


def test_every_sequence_opens_with_one_bos(world_codec, tmp_path):
    world_codec.save(tmp_path)
    bos = world_codec.tokenizer.bos_token_id
    for codec in (world_codec, Codec.load(str(tmp_path))):
        rows = codec.prompts(["hot", "fox"]) + codec.documents(["hot", "文字"]) + codec.few_shot([("a", "b")], ["c"])
        assert all(row[0] == bos and row.count(bos) == 1 for row in rows)
        assert bos not in codec.response("cold")


def test_causal_collator():
    batch = CausalCollator(9)([{"input_ids": [1, 2, 3]}, {"input_ids": [4], "labels": [5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [5, -100, -100]]


def test_a_pad_of_its_own(tiny_codec):
    """Classifiers of transformers read the last token that is no pad: of a pad that is EOS, the one before EOS."""
    assert tiny_codec.with_own_pad() is tiny_codec
    same = copy.deepcopy(tiny_codec.tokenizer)
    same.pad_token = same.eos_token
    shared = Codec(same)
    assert shared.pad_id == shared.eos_id
    apart = shared.with_own_pad()
    assert apart.pad_id == tiny_codec.pad_id == apart.tokenizer.pad_token_id  # <pad> is there, and special
    assert shared.tokenizer.pad_token_id == shared.eos_id, "the policy's stays"
    text = "a <pad> b"
    assert apart.prompt(text) == shared.prompt(text) and apart.response(text) == shared.response(text)


def test_a_pad_where_no_other_special_token_is(tmp_path):
    """GPT-2's: any number but EOS, the tokenizer as it is."""
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<eos>": 0, "a": 1}, "a")), eos_token="<eos>")
    apart = Codec(fast).with_own_pad()
    assert apart.pad_id == 1 != apart.eos_id and apart.tokenizer.pad_token is None


def with_template(codec: Codec, template: str) -> Codec:
    tokenizer = copy.deepcopy(codec.tokenizer)
    tokenizer.chat_template = template
    return Codec(tokenizer)


def test_a_template_that_writes_the_date_writes_the_same_one_each_day(tiny_codec):
    """Llama 3.2's does: a run resumed the day after would read other tokens."""
    template = "Today: {{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.content }}\n{% endfor %}"
    dated = with_template(tiny_codec, template)
    assert dated.render("hot") == "Today: 26 Jul 2024\nhot\n"
    for form, date in (("%Y-%m-%d", "2024-07-26"), ("%B %d, %Y", "July 26, 2024")):
        other = with_template(tiny_codec, "\n" + template.replace("%d %b %Y", form))
        assert other.render("hot") == f"\nToday: {date}\nhot\n"
    assert dated.tokenizer.chat_template == template, "what is saved stays as it was"


def test_an_answer_does_not_lie_in_an_open_thought(tiny_codec):
    """As in Qwen 3.5's: a prompt leaves <think> open unless thinking is off."""
    template = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think>\n"
        "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
    )
    assert with_template(tiny_codec, template).render("hot") == "hot\n<think>\n</think>\n\n"
    closed = template.replace("<think>\n{% if", "{% if")
    assert with_template(tiny_codec, closed).render("hot") == "hot\n", "nothing is open, so nothing is closed"


def test_a_tokenizer_that_appends_EOS_ends_no_prompt(tiny_codec):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_codec.tokenizer)
    tokenizer.chat_template = None
    plain = Codec(copy.deepcopy(tokenizer))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tiny_codec.eos_id)]
    )
    ending = Codec(tokenizer)
    assert ending.tokenizer("hot")["input_ids"][-1] == ending.eos_id
    assert ending.prompts(["hot", ""]) == plain.prompts(["hot", ""])
    assert ending.documents(["hot"]) == plain.documents(["hot"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # OPT's: what opens a text is EOS
        single="<eos> $A", special_tokens=[("<eos>", tiny_codec.eos_id)]
    )
    assert Codec(tokenizer).prompts(["hot"]) == [[tiny_codec.eos_id, *plain.prompt("hot")]]
