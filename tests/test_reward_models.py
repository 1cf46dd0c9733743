"""Reward models of any tokenizer and architecture, against transformers on each text alone."""

import copy
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from align.config import EnsembleTerm, FunctionTerm, ModelTerm, PPOConfig
from align.errors import UserError
from align.evaluate.scorer import load_scorer
from align.manifest import write_manifest
from align.models import load_scalar_model, save_scalar_model
from align.reward_models import (
    ClosedCodec,
    ValueStart,
    build_reward,
    check_reward_models,
    load_reward,
    positions,
    reads_sampled_tokens,
    require_same_tokens,
    reward_config,
    say_other_end,
    value_start,
)
from align.rewards import ModelReward, PairReward, TextReward
from align.text import Codec
from align.types import Episode, Prompt, Ranking

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = ("cold", "a cow, a dog and a bird", "苹果、香蕉")
FINISHED = (True, False, True)
PROMPTS = [
    Prompt("Which word is the opposite of hot?", {"id": "a"}),
    Prompt(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name animals."}), {"id": "b"}),
    Prompt("用中文说出三种水果。", {"id": "c"}),
]


@pytest.fixture(scope="module")
def chatml() -> Codec:
    """Another byte-level BPE: other numbers, another EOS, and a template that writes a newline after an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|im_start|>", "<|im_end|>", "<fill>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the cow and the dog and the animals there"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<fill>")
    fast.chat_template = CHATML
    return Codec(fast)


def llama(codec: Codec, seed: int, **sizes) -> LlamaConfig:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | sizes
    return LlamaConfig(
        vocab_size=len(codec.tokenizer), pad_token_id=codec.pad_id, eos_token_id=codec.eos_id, bos_token_id=None,
        initializer_range=0.3, **shape,
    )  # fmt: skip


def save_classifier(folder: Path, codec: Codec, seed: int, **sizes) -> LlamaForSequenceClassification:
    """As other people's reward models come: no manifest, no bias."""
    model = LlamaForSequenceClassification(llama(codec, seed, **{"num_labels": 1} | sizes)).eval()
    model.save_pretrained(folder)
    codec.save(folder)
    return model


@pytest.fixture
def world(tmp_path, tiny_codec, chatml) -> Path:
    """A policy; two reward models with its tokenizer, one of them ours; a larger one with another."""
    LlamaForCausalLM(llama(tiny_codec, 0)).save_pretrained(tmp_path / "policy")
    tiny_codec.save(tmp_path / "policy")
    ours = load_scalar_model(str(tmp_path / "policy"), fresh_head=True)
    ours.head.bias.data.fill_(0.7)
    save_scalar_model(ours, tmp_path / "rm", tiny_codec.pad_id)
    tiny_codec.save(tmp_path / "rm")
    write_manifest(tmp_path / "rm", "rm", {}, 0)
    save_classifier(tmp_path / "alike", tiny_codec, 1)
    save_classifier(tmp_path / "foreign", chatml, 2, hidden_size=24, num_hidden_layers=2)
    return tmp_path


@pytest.fixture
def episodes(tiny_codec) -> list[Episode]:
    queries = tiny_codec.prompts([prompt.prompt for prompt in PROMPTS])
    responses = tiny_codec.responses(list(ANSWERS))
    return [
        Episode(tuple(query), tuple(response if done else response[:-1]), done)
        for query, response, done in zip(queries, responses, FINISHED, strict=True)
    ]


def config_of(world: Path, *terms, **changes) -> PPOConfig:
    reward = tuple(terms) or (ModelTerm(str(world / "rm")),)
    return PPOConfig("out", model_name_or_path=str(world / "policy"), reward=reward, ptx_coef=0.0, **changes)


def conversation(prompt: Prompt, answer: str) -> list[dict]:
    asked = [{"role": "user", "content": prompt.prompt}] if isinstance(prompt.prompt, str) else list(prompt.prompt)
    return [*asked, {"role": "assistant", "content": answer}]


@torch.no_grad()
def stock_scores(folder: Path, codec: Codec) -> list[float]:
    """The foreign reward model as its makers use it: transformers' class, their template over the conversation. An
    answer that was cut off is closed like the others."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        text = codec.tokenizer.apply_chat_template(conversation(prompt, answer), tokenize=False)
        ids = codec.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        scores.append(float(model(ids).logits[0, 0]))
    return scores


def load(path: Path, codec: Codec, batch_size: int = 2):
    return load_reward(str(path), "reward[0].model", codec, frozen_scalar, batch_size)


def frozen_scalar(path: str):
    return load_scalar_model(path).requires_grad_(False).eval()


# Which tokenizer


def changed(codec: Codec, folder: Path, change) -> str:
    tokenizer = copy.deepcopy(codec.tokenizer)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_who_shares_the_policys_tokenizer(tmp_path, tiny_codec, chatml):
    def shares(name: str, change) -> bool:
        return reads_sampled_tokens(changed(tiny_codec, tmp_path / name, change), tiny_codec)

    def template(tokenizer):
        tokenizer.chat_template = CHATML

    def tools(tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] ~ m.get('tool', '')")

    def eos(tokenizer):
        tokenizer.eos_token = "<pad>"

    chatml.save(tmp_path / "other")
    (tmp_path / "bare").mkdir()
    assert shares("same", lambda tokenizer: None)
    assert shares("one more token", lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}))
    assert not shares("template", template)
    assert not shares("tools", tools), "though single messages look the same"
    assert not shares("eos", eos)
    assert not reads_sampled_tokens(str(tmp_path / "other"), tiny_codec)
    assert reads_sampled_tokens(str(tmp_path / "bare"), tiny_codec), "no tokenizer: trained on the policy's tokens"


def test_bos_in_front_makes_another_tokenizer(tmp_path, tiny_codec):
    from tokenizers.processors import TemplateProcessing

    def plain(tokenizer):
        tokenizer.chat_template = None

    def bos(tokenizer):
        tokenizer.chat_template = None
        post = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", tokenizer.pad_token_id)])
        tokenizer.backend_tokenizer.post_processor = post

    policy = Codec.load(changed(tiny_codec, tmp_path / "plain", plain))
    assert reads_sampled_tokens(str(tmp_path / "plain"), policy)
    assert not reads_sampled_tokens(changed(tiny_codec, tmp_path / "bos", bos), policy)


# What each reads, and how it scores


def test_another_tokenizer_reads_the_text_in_its_own_format(world, tiny_codec, chatml, episodes):
    reward = load(world / "foreign", tiny_codec)
    assert type(reward) is TextReward
    texts = [chatml.tokenizer.decode(row) for row in reward.rows(PROMPTS, episodes)]
    assert texts == [
        "<|im_start|>user\nWhich word is the opposite of hot?<|im_end|>\n<|im_start|>assistant\ncold<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName animals.<|im_end|>\n"
        "<|im_start|>assistant\na cow, a dog and a bird<|im_end|>\n",
        "<|im_start|>user\n用中文说出三种水果。<|im_end|>\n<|im_start|>assistant\n苹果、香蕉<|im_end|>\n",
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_another_tokenizer_scores_as_its_makers_do(world, tiny_codec, chatml, episodes, batch_size):
    reward = load(world / "foreign", tiny_codec, batch_size)
    expected = stock_scores(world / "foreign", chatml)
    assert reward(PROMPTS, episodes) == pytest.approx(expected, abs=1e-5)
    assert reward(PROMPTS[::-1], episodes[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert max(expected) - min(expected) > 0.05, "the setup should tell the answers apart"


def test_an_answer_cannot_end_itself_in_the_other_format(world, tiny_codec, chatml):
    """A policy that writes the reward model's end-of-turn as text has not written the token."""
    response = tuple(tiny_codec.response("cold<|im_end|>"))
    row = load(world / "foreign", tiny_codec).rows(PROMPTS[:1], [Episode((5,), response, True)])[0]
    assert row.count(chatml.eos_id) == 2, "of the question and of the answer"


def test_what_closes_an_answer_is_what_its_makers_template_writes(chatml, tiny_codec):
    newline = chatml.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert ClosedCodec(chatml.tokenizer).closing == [chatml.eos_id, *newline]
    assert ClosedCodec(tiny_codec.tokenizer).closing == [tiny_codec.eos_id]
    silent = copy.deepcopy(chatml.tokenizer)
    silent.chat_template = "{{ messages[0].content }}"  # leaves answers out
    assert ClosedCodec(silent).closing == [chatml.eos_id]


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_what_opens_an_answer_is_too(chatml):
    """Qwen3's template writes an empty thought before each last answer, which a prompt for one does not have."""
    tokenizer = copy.deepcopy(chatml.tokenizer)
    tokenizer.chat_template = THINKING
    codec = ClosedCodec(tokenizer)
    for prompt in ("hot", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cow"})):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        makers = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "the dog"}], tokenize=False)
        ours = codec.prompt(prompt) + codec.response("the dog")
        assert tokenizer.decode(ours) == makers and "<think>\n\n</think>\n\nthe dog" in makers


def test_the_same_tokenizer_reads_the_sampled_tokens(world, tiny_codec, episodes):
    model = LlamaForSequenceClassification.from_pretrained(world / "alike").eval()
    reward = load(world / "alike", tiny_codec)
    assert type(reward) is ModelReward
    with torch.no_grad():
        rows = [[*e.query, *e.response, *([] if e.finished else [tiny_codec.eos_id])] for e in episodes]
        expected = [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]
    assert reward(PROMPTS, episodes) == pytest.approx(expected, abs=1e-5)


def test_one_model_is_read_alike_by_ppo_and_by_evaluation(world, bert, tmp_path, tiny_codec, chatml, episodes):
    """The policy's own tokenizer whose template writes more than EOS, another tokenizer, and no language model."""
    tokenizer = copy.deepcopy(tiny_codec.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "{{ eos_token + '\n' }}")
    chatty = Codec(tokenizer)
    save_classifier(tmp_path / "newline", chatty, 5)
    rankings = [Ranking(p.prompt, (a, "?"), (0.0, 1.0)) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    for folder, codec in ((tmp_path / "newline", chatty), (world / "foreign", tiny_codec), (bert, tiny_codec)):
        said = load(folder, codec)(PROMPTS, episodes)
        read = load_scorer(str(folder), "x", torch.device("cpu")).score(rankings, 2)
        assert said == pytest.approx([scores[0] for scores in read], abs=1e-5)
    reward = load(tmp_path / "newline", chatty)
    assert type(reward) is TextReward and all(row[-2] == chatty.eos_id for row in reward.rows(PROMPTS, episodes))
    config = config_of(world, ModelTerm(str(tmp_path / "newline")))
    assert value_start(config, chatty).fresh_head, "a value is read at EOS, where this model has learned nothing"
    write_manifest(tmp_path / "newline", "rm", {}, seed=0)
    assert type(load(tmp_path / "newline", chatty)) is ModelReward, "ours is read at EOS"


def test_rows_over_the_models_context_lose_their_first_tokens(world, tmp_path, tiny_codec, chatml, episodes):
    save_classifier(tmp_path / "short", chatml, 2, max_position_embeddings=48)
    reward = load(tmp_path / "short", tiny_codec)
    rows = reward.rows(PROMPTS, episodes)
    over = sum(len(row) > 48 for row in rows)
    assert over > 0
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "short").eval()
    with torch.no_grad():
        expected = [float(model(torch.tensor([row[-48:]])).logits[0, 0]) for row in rows]
    assert reward(PROMPTS, episodes) == pytest.approx(expected, abs=1e-5)
    assert reward.notes == {"cut": over / 3}


# Other architectures


@pytest.fixture
def bert(tmp_path) -> Path:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "which",
        "word",
        "opposite",
        "hot",
        "cold",
        "a",
        "cow",
        "dog",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "?", "果", "三", "苹"]), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_classifier_that_is_no_language_model_reads_pairs(bert, tiny_codec, episodes):
    tokenizer = BertTokenizerFast.from_pretrained(bert)
    model = BertForSequenceClassification.from_pretrained(bert).eval()
    expected = []
    questions = (PROMPTS[0].prompt, "Be brief.\n\nName animals.", PROMPTS[2].prompt)
    for question, answer in zip(questions, ANSWERS, strict=True):
        with torch.no_grad():
            expected.append(float(model(**tokenizer(question, answer, return_tensors="pt")).logits[0, 0]))
    for batch_size in (1, 2, 8):
        reward = load(bert, tiny_codec, batch_size)
        assert type(reward) is PairReward
        assert reward(PROMPTS, episodes) == pytest.approx(expected, abs=1e-5)
        assert reward.notes == {"cut": 0.0}


def test_a_long_pair_is_cut_on_the_left(bert, tiny_codec, episodes):
    tokenizer = BertTokenizerFast.from_pretrained(bert)
    model = BertForSequenceClassification.from_pretrained(bert).eval()
    reward = load(bert, tiny_codec)
    scores = reward([Prompt("dog " * 60 + "hot cow"), PROMPTS[0]], [episodes[0], episodes[0]])
    with torch.no_grad():  # 32 positions, of which [CLS], [SEP], [SEP] and the answer's one word take 4
        kept = tokenizer("dog " * 26 + "hot cow", "cold", return_tensors="pt")
        assert kept["input_ids"].shape[1] == 32
        assert scores[0] == pytest.approx(float(model(**kept).logits[0, 0]), abs=1e-5)
    assert reward.notes == {"cut": 0.5}


@pytest.mark.parametrize(("limit", "context"), [(12, 12), (40, 32)])
def test_a_pair_is_cut_to_what_tokenizer_and_model_can_both_read(bert, tiny_codec, limit, context):
    tokenizer = BertTokenizerFast.from_pretrained(bert)
    tokenizer.model_max_length = limit
    tokenizer.save_pretrained(bert)
    assert load(bert, tiny_codec).context == context


# What is refused


def refused(words: str, call, *args) -> None:
    with pytest.raises(UserError, match=words) as error:
        call(*args)
    assert "\n" not in str(error.value)


def test_what_is_no_reward_model(world, bert, tmp_path, tiny_codec):
    save_classifier(tmp_path / "three", tiny_codec, 4, num_labels=3)
    refused(r"reward\[0\].model: .*has 3 labels", load, tmp_path / "three", tiny_codec)
    refused("LlamaForCausalLM without a head", load, world / "policy", tiny_codec)
    refused("no model could be loaded", load, tmp_path / "nothing", tiny_codec)
    weights = load_file(bert / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, bert / "model.safetensors", {"format": "pt"})
    refused("no trained head", load, bert, tiny_codec)
    refused(r"reward\[1\].models\[0\]: .*no such checkpoint", check_reward_models,
            (ModelTerm(str(world / "rm")), EnsembleTerm((str(tmp_path / "gone"), "x"))))  # fmt: skip
    write_manifest(world / "alike", "sft", {}, 0)
    refused(r"reward\[0\].model: .*comes from stage sft", check_reward_models, (ModelTerm(str(world / "alike")),))
    assert reward_config(str(world / "rm"), "reward_model_path").num_labels == 1


# Where the value model starts


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["rm"], ("rm", False, "rm")),
        (["foreign", "alike"], ("alike", False, "alike")),
        (["foreign"], ("policy", True, None)),
        ([("foreign", "alike")], ("alike", False, None)),  # no term has this model's score alone
        ([("alike", "rm"), "rm"], ("alike", False, None)),
        ([], ("policy", True, None)),
    ],
)
def test_P2_where_the_value_model_starts(world, tiny_codec, names, expected):
    def term(name):
        return (
            ModelTerm(str(world / name)) if isinstance(name, str) else EnsembleTerm(tuple(str(world / n) for n in name))
        )

    path, fresh, compared = expected
    config = config_of(world, *map(term, names), FunctionTerm("math:sqrt"))
    assert value_start(config, tiny_codec) == ValueStart(str(world / path), fresh, compared)


def test_P2_a_value_model_of_the_users_choice(world, tiny_codec):
    foreign, rm = ModelTerm(str(world / "foreign")), str(world / "rm")
    assert value_start(config_of(world, foreign, value_model_path=rm), tiny_codec) == ValueStart(rm, False, None)
    terms = (foreign, ModelTerm(rm, weight=0.5, name="own"))
    assert value_start(config_of(world, *terms, value_model_path=rm), tiny_codec) == ValueStart(rm, False, "own")


def test_a_model_that_reads_other_tokens_is_refused_by_name(world, tmp_path, tiny_codec):
    """With a template of its own it may do; without a tokenizer it was trained on the policy's tokens."""
    renumbered = copy.deepcopy(tiny_codec.tokenizer)
    renumbered.chat_template = CHATML
    renumbered.save_pretrained(tmp_path / "template")
    require_same_tokens(str(tmp_path / "template"), "value_model_path", tiny_codec)
    (tmp_path / "bare").mkdir()
    require_same_tokens(str(tmp_path / "bare"), "value_model_path", tiny_codec)
    refused(
        f"value_model_path: {world / 'foreign'}: its tokenizer .* the policy's token '",
        require_same_tokens, str(world / "foreign"), "value_model_path", tiny_codec,
    )  # fmt: skip
    ends_otherwise = copy.deepcopy(tiny_codec.tokenizer)
    ends_otherwise.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    refused(
        "does not know the policy's token '<end>'", require_same_tokens, str(world / "rm"), "key", Codec(ends_otherwise)
    )
    learned = copy.deepcopy(tiny_codec.tokenizer)
    learned.add_tokens(["<new>"])
    refused("does not know the policy's token '<new>'", require_same_tokens, str(world / "rm"), "key", Codec(learned))


def test_a_policy_whose_template_ends_answers_with_another_token_is_warned_of(world, tmp_path, chatml, capsys):
    say_other_end(str(world / "foreign"), chatml)
    assert "warning" not in capsys.readouterr().out
    other = copy.deepcopy(chatml.tokenizer)
    other.eos_token = "<fill>"  # as Gemma's <eos>, where <end_of_turn> closes an answer
    other.save_pretrained(tmp_path / "other")
    say_other_end(str(tmp_path / "other"), Codec(other))
    said = capsys.readouterr().out
    assert "its template ends answers with <|im_end|>, and here EOS, <fill>, ends them" in said


# All of it


@dataclass(frozen=True)
class Machine:
    """What of a Runtime the building of rewards reads."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compute_dtype: torch.dtype = torch.float32

    def as_many(self, batches: list[list[int]]) -> list[list[int]]:
        return batches


def test_the_whole_sum(world, bert, tiny_codec, chatml, episodes, monkeypatch, capsys):
    module = types.ModuleType("some_rewards")
    module.brief = lambda prompts, completions, **columns: [-float(len(text)) for text in completions]
    monkeypatch.setitem(sys.modules, "some_rewards", module)
    terms = (
        ModelTerm(str(world / "foreign"), weight=2.0),
        EnsembleTerm((str(world / "rm"), str(world / "alike"), str(bert)), "mean_minus_std", 0.5, 3.0, "crowd"),
        FunctionTerm("some_rewards:brief", 0.25),
    )
    scored = build_reward(config_of(world, *terms), tiny_codec, frozen_scalar, Machine())(PROMPTS, episodes)
    foreign = stock_scores(world / "foreign", chatml)
    members = [load(world / name, tiny_codec)(PROMPTS, episodes) for name in ("rm", "alike", "bert")]
    for i in range(3):
        three = [scores[i] for scores in members]
        mean = sum(three) / 3
        crowd = mean - 0.5 * (sum((x - mean) ** 2 for x in three) / 3) ** 0.5
        assert scored.parts["scores/crowd"][i] == pytest.approx(crowd, abs=1e-5)
        assert scored.total[i] == pytest.approx(2 * foreign[i] + 3 * crowd - 0.25 * len(ANSWERS[i]), abs=1e-4)
    keys = {"scores/foreign", "cut/foreign", "scores/crowd", "deviation/crowd", "cut/crowd"}
    assert set(scored.parts) == keys | {"scores/brief", "failures/brief"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "reward foreign, weight 2", "reward crowd, weight 3", "reward brief, weight 0.25"
    ]  # fmt: skip
    assert "of its own" in lines[0] and "no manifest" in lines[0]
    ours, alike, pairs = lines[1].split("; ")
    assert "reads the sampled tokens" in ours and "no manifest" not in ours and "no manifest" in alike
    assert "pairs of texts" in pairs


def test_robertas_first_positions_hold_no_token():
    """They count from behind the pad's: a table of 12 has room for 10 tokens, and an eleventh has no row."""
    config = RobertaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=12, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    assert positions(model) == 10
    model(torch.full((1, 10), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 11), 5))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    assert positions(BertForSequenceClassification(BertConfig(max_position_embeddings=12, **sizes))) == 12
