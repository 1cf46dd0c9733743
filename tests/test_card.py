"""align/card.py: the card says what the manifest says, and its code loads what lies beside it."""

import copy
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from align.card import LOAD
from align.config import RMConfig
from align.manifest import write_manifest
from align.models import load_scalar_model, save_scalar_model
from align.ranking import score_rows
from align.rows import DataReport
from align.text import Codec


@pytest.fixture(params=["llama", "gpt_neox"])
def reward_folder(request, tiny_llama, tiny_codec: Codec, tmp_path):
    """GPT-NeoX has no class for tokens with a head of that name."""
    neox = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    policy = tiny_llama if request.param == "llama" else GPTNeoXForCausalLM(neox)
    policy.resize_token_embeddings(len(tiny_codec.tokenizer))
    policy.save_pretrained(tmp_path / "policy")
    folder = tmp_path / "rm"
    folder.mkdir()
    model = load_scalar_model(str(tmp_path / "policy"), "eager", fresh_head=True)
    with torch.no_grad():
        model.head.bias.fill_(0.7)
    save_scalar_model(model, folder, tiny_codec.pad_id)
    tiny_codec.save(folder)
    parent = {"role": "model_name_or_path", "path": "runs/x/sft", "stage": "sft", "weights_sha256": "ab" * 32}
    report = DataReport(("r.jsonl",), 9, 7, {}, {"all_ties": 2})
    write_manifest(
        folder,
        "rm",
        RMConfig("out"),
        5,
        [parent],
        {"train_file": report},
        {"loss": 0.75, "validation": {"accuracy": {"mean": 0.7, "low": 0.6, "high": 0.8}}},
    )
    return folder


def test_the_card_says_what_the_manifest_says(reward_folder):
    card = ModelCard.load(reward_folder / "README.md")
    assert card.data.pipeline_tag == "text-classification" and "rm" in card.data.tags
    for words in ("Seed 5", "model_name_or_path: runs/x/sft, abababababab", '7 rows, dropped: {"all_ties": 2}'):
        assert words in card.text
    assert "- loss: 0.75\n- validation accuracy: 0.700 [0.600, 0.800]" in card.text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])
    assert settings["learning_rate"] == 9e-6


def test_the_cards_code_loads_the_scores(reward_folder, tiny_codec):
    code = re.search(r"```python\n(.*?)```", (reward_folder / "README.md").read_text(), re.DOTALL)[1]
    names = {"folder": str(reward_folder), "prompt": "The opposite of hot", "answer": "cold, a dog"}
    exec(code, names)
    row = tiny_codec.prompt(names["prompt"]) + tiny_codec.response(names["answer"])
    assert names["ids"] == row
    (ours,) = score_rows(load_scalar_model(str(reward_folder)).eval(), [row], tiny_codec.pad_id, 1)
    assert float(names["reward"][0].detach()) == pytest.approx(ours, abs=1e-5)


def test_the_cards_code_answers_with_and_without_a_chat_template(tiny_llama, tiny_codec, tmp_path):
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    tiny_llama.generation_config.update(do_sample=False, eos_token_id=None)
    plain, chat = copy.deepcopy(tiny_codec.tokenizer), copy.deepcopy(tiny_codec.tokenizer)
    plain.chat_template, chat.chat_template = None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    answers = []
    for name, tokenizer in (("plain", plain), ("chat", chat)):
        tiny_llama.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        names = {"folder": str(tmp_path / name), "prompt": "the opposite of hot"}
        exec(LOAD, names)
        answers.append(names["answer"])
        ids = [int(i) for i in names["inputs"]["input_ids"][0]]
        assert ids == tiny_codec.tokenizer(names["prompt"])["input_ids"]
        for _ in range(256):
            with torch.no_grad():
                ids.append(int(tiny_llama(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = tokenizer.decode(ids[-256:], skip_special_tokens=True)
    assert answers == [expected] * 2 and expected


def test_an_accuracy_of_no_pairs_is_no_crash(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    nothing = {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    write_manifest(tmp_path, "rm", {}, 0, metrics={"validation": {"accuracy": nothing}})
    assert "- validation accuracy: no pair to compare" in (tmp_path / "README.md").read_text()


def test_no_card_without_a_model(tmp_path):
    write_manifest(tmp_path, "collect", {}, 0)
    assert not (tmp_path / "README.md").exists()
