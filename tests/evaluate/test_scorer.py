"""Scores by any sequence classifier, and the check that batching and padding do not move them."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from align.errors import UserError
from align.evaluate.scorer import ClassifierScorer, ScalarScorer, load_scorer, score_spread
from align.manifest import write_manifest
from align.models import load_scalar_model, save_scalar_model
from align.text import Codec
from align.types import Ranking

CPU = torch.device("cpu")
RANKINGS = [
    Ranking("hot?", ("cold", "用中文", "a"), (0, 1, 1)),
    Ranking("Name three animals that live on a farm.", ("cow", "a dog and a bird"), (1, 0)),
    Ranking("?", ("the same", "the same or another", "cold"), (0, 2, 1)),
]


def llama(codec, **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=len(codec.tokenizer), pad_token_id=0, **sizes, **changes)


def saved(model, codec, folder) -> str:
    model.save_pretrained(folder)
    codec.save(folder)
    return str(folder)


@pytest.fixture
def ours(tiny_codec, tmp_path):
    """A reward model as `rm` writes it."""
    LlamaForCausalLM(llama(tiny_codec)).save_pretrained(tmp_path / "base")
    model = load_scalar_model(str(tmp_path / "base"), fresh_head=True)
    model.head.bias.data.fill_(0.5)
    save_scalar_model(model, tmp_path / "rm", tiny_codec.pad_id)
    tiny_codec.save(tmp_path / "rm")
    write_manifest(tmp_path / "rm", "rm", {}, seed=0)
    return str(tmp_path / "rm")


def test_ours_is_read_with_its_bias_and_scores_in_order(ours, tiny_codec):
    scorer = load_scorer(ours, "reward_model_path", CPU)
    assert isinstance(scorer, ScalarScorer) and scorer.model.head.bias.item() == 0.5
    scores = scorer.score(RANKINGS, 2)
    for ranking, row in zip(RANKINGS, scores, strict=True):
        for completion, score in zip(ranking.completions, row, strict=True):
            ids = torch.tensor([tiny_codec.prompt(ranking.prompt) + tiny_codec.response(completion)])
            with torch.no_grad():
                state = scorer.model.inner.base_model(input_ids=ids).last_hidden_state[0, -1]
            assert score == pytest.approx(scorer.model.head(state).item(), abs=1e-5)
    assert scorer.tokens(RANKINGS[1]) == len(tiny_codec.prompt(RANKINGS[1].prompt)) + len(
        tiny_codec.response("a dog and a bird")
    )


def test_a_stock_decoder_classifier(tiny_codec, tmp_path):
    """TRL's reward models: no bias, the score read at the last token by the model's own forward."""
    model = LlamaForSequenceClassification(llama(tiny_codec, num_labels=1)).eval()
    scorer = load_scorer(saved(model, tiny_codec, tmp_path), "peer_model_path", CPU)
    ids = torch.tensor([tiny_codec.prompt("hot?") + tiny_codec.response("用中文")])
    with torch.no_grad():
        assert scorer.score(RANKINGS, 3)[0][1] == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-5)


def test_anothers_model_is_read_where_its_chat_template_ends(tiny_codec, tmp_path):
    """A newline after EOS, as ChatML writes it: TRL tokenizes whole chats, so its models learned to end there."""
    tokenizer = copy.deepcopy(tiny_codec.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "{{ eos_token + '\n' }}")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama(tiny_codec, num_labels=1)).eval()
    scorer = load_scorer(saved(model, Codec(tokenizer), tmp_path), "peer_model_path", CPU)
    chat = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "用中文"}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    assert ids[0, -2] == tokenizer.eos_token_id != ids[0, -1]
    with torch.no_grad():
        assert scorer.score(RANKINGS, 3)[0][1] == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-5)
    write_manifest(tmp_path, "rm", {}, seed=0)  # one of ours is read at EOS
    with torch.no_grad():
        expected = float(model(ids[:, :-1]).logits[0, 0])
    assert load_scorer(str(tmp_path), "x", CPU).score(RANKINGS, 3)[0][1] == pytest.approx(expected, abs=1e-5)


def test_an_encoder_scores_prompt_and_completion_as_a_pair(tiny_codec, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=400, num_labels=1, **sizes)).eval()
    scorer = load_scorer(saved(model, tiny_codec, tmp_path), "reward_model_path", CPU)
    assert isinstance(scorer, ClassifierScorer) and scorer.context == 512
    scores = scorer.score(RANKINGS, 2)
    row = scorer.tokenizer("hot?", "cold", return_tensors="pt")
    with torch.no_grad():
        assert scores[0][0] == pytest.approx(float(model(**row).logits), abs=1e-5)
    spread = score_spread(scorer, RANKINGS, 2, seed=0)
    assert set(spread["ways"]) == {"a prompt at a time", "batches of like length", "other batch mates"}
    assert spread["max_difference"] < 1e-5 and sum(spread["flipped_pairs"].values()) == 0


def test_an_encoder_counts_the_tokens_of_the_longest_pair():
    def words(prompt, completion):
        return {"input_ids": ["[CLS]", *prompt.split(), "[SEP]", *completion.split(), "[SEP]"]}

    scorer = ClassifierScorer(None, words, 20)
    assert scorer.tokens(Ranking("Name a pet.", ("cat", "a small grey cat", "a dog"), (0, 1, 2))) == 10, "3 + 4 + 3"


def test_batching_and_padding_do_not_move_a_score(ours):
    scorer = load_scorer(ours, "reward_model_path", CPU)
    spread = score_spread(scorer, RANKINGS, 4, seed=0)
    assert len(spread["ways"]) == 5 and spread["rows"] == 8
    assert spread["max_difference"] < 1e-5 < spread["score_std"]
    assert scorer.model.packed, "the check leaves the model as it was"


def test_a_model_that_padding_moves_is_caught(ours, monkeypatch):
    """A scorer that looks around: the k-th completion's score shifts by 0.1 k a prompt beside it."""
    scorer = load_scorer(ours, "reward_model_path", CPU)
    true = ScalarScorer.score

    def leaky(self, rankings, batch_size):
        return [[s + 0.1 * k * len(rankings) for k, s in enumerate(row)] for row in true(self, rankings, batch_size)]

    monkeypatch.setattr(ScalarScorer, "score", leaky)
    spread = score_spread(scorer, RANKINGS, 4, seed=0)
    # Alone k is 0; with all three prompts the third completion is off by 0.1 x 2 x 3, with two of them by 0.4.
    assert spread["max_difference"] == spread["ways"]["batches of like length"] == pytest.approx(0.6, abs=1e-4)
    assert spread["ways"]["other batch mates"] <= 0.4001 and spread["ways"]["plain rows"] < 1e-5


@pytest.mark.parametrize("labels", [1, 2])
def test_what_is_no_reward_model(tiny_codec, tmp_path, labels):
    if labels == 1:
        path, words = saved(LlamaForCausalLM(llama(tiny_codec)), tiny_codec, tmp_path), "LlamaForCausalLM"
    else:
        model = LlamaForSequenceClassification(llama(tiny_codec, num_labels=2))
        path, words = saved(model, tiny_codec, tmp_path), "2 labels"
    with pytest.raises(UserError, match=words) as caught:
        load_scorer(path, "peer_model_path", CPU)
    assert str(caught.value).startswith("peer_model_path") and len(str(caught.value).splitlines()) == 1


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="reward_model_path"):
        load_scorer(str(tmp_path), "reward_model_path", CPU)
