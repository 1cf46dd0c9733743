"""align/evaluate/choices.py: what a policy finds likely, against a loop over whole rows in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.errors import UserError
from align.evaluate.choices import Weighed, binary_entropy, choices_report, continuation_logprobs, encode, weigh
from align.models import Policy
from align.types import Choice
from tests.evaluate.test_win_rate import close  # an interval against three numbers


@pytest.fixture
def policy(tiny_codec):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_codec.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.5,
        bos_token_id=None, eos_token_id=tiny_codec.eos_id, pad_token_id=tiny_codec.pad_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


ROWS = [
    Choice("Which word is the opposite of hot?", ("cold", "a bird and a boat", "hot"), (0,)),
    Choice(None, ("a cow, a dog and a bird", "a cow, a dog and a boat")),
    Choice(({"role": "user", "content": "Name three animals."}, {"role": "assistant", "content": "a fox"},
            {"role": "user", "content": "用中文说"}), ("苹果", "梨。"), (1,)),
    Choice("x", ("y", "z"), (0, 1)),
]  # fmt: skip


def by_loop(model, query: list[int], choice: list[int]) -> float:
    ids = torch.tensor([[*query, *choice]])
    logprobs = model.double()(input_ids=ids).logits[0].log_softmax(-1)
    total = sum(float(logprobs[len(query) - 1 + i, token]) for i, token in enumerate(choice))
    model.float()
    return total


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_O5_log_probabilities_are_those_of_each_choice_alone(policy, tiny_codec, packed, batch_size):
    found = weigh(Policy(policy, packed=packed), ROWS, tiny_codec, batch_size)
    tokenizer, eos = tiny_codec.tokenizer, tiny_codec.eos_id
    for row, weighed in zip(ROWS, found, strict=True):
        query = [eos] if row.prompt is None else tiny_codec.prompt(row.prompt)  # this tokenizer has no BOS
        choices = [tokenizer(choice)["input_ids"] for choice in row.choices]
        assert weighed.tokens == tuple(map(len, choices))
        with torch.no_grad():
            expected = [by_loop(policy, query, choice) for choice in choices]
        assert weighed.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_text_without_a_prompt_stands_behind_what_opens_a_sequence(tiny_codec):
    """A BOS that the tokenizer never writes there, as SmolLM2's opens a turn, opens none."""
    (query, choices), *_ = encode([ROWS[1]], tiny_codec)
    assert query == [tiny_codec.eos_id] and not any(tiny_codec.eos_id in choice for choice in choices)
    tiny_codec = copy.deepcopy(tiny_codec)
    tiny_codec.tokenizer.bos_token = "<pad>"
    assert encode([ROWS[1]], tiny_codec)[0][0] == [tiny_codec.eos_id]
    tiny_codec.tokenizer.chat_template = "{{ bos_token }}" + tiny_codec.tokenizer.chat_template
    assert encode([ROWS[1]], tiny_codec)[0][0] == [tiny_codec.tokenizer.bos_token_id]


@pytest.mark.parametrize(
    ("prompt", "choice", "text"),
    [("a cow", "runs", " runs"), ("a cow ", "runs", "runs"), ("a cow", " runs", " runs"), ("水果", "苹果", "苹果")],
)
def test_without_a_template_a_space_parts_prompt_and_choice(tiny_codec, prompt, choice, text):
    tiny_codec = copy.deepcopy(tiny_codec)
    tiny_codec.tokenizer.chat_template = None
    ((_, (one, _)),) = encode([Choice(prompt, (choice, "x"), (0,))], tiny_codec)
    assert one == tiny_codec.tokenizer(text)["input_ids"]


def test_a_model_that_gives_no_numbers_is_named(policy, tiny_codec):
    torch.nn.init.constant_(policy.lm_head.weight, math.nan)
    with pytest.raises(UserError, match="choices_file: row 1 of 4 in use: a choice has no token or no finite"):
        weigh(Policy(policy), ROWS, tiny_codec, 8)


def test_choices_of_one_token_are_read_from_the_prompts_last_state(policy):
    queries, rows = [[5, 6, 7], [8]], [[[9], [10, 11]], [[12], [13]]]
    with torch.no_grad():
        found = continuation_logprobs(Policy(policy), queries, rows, 0)
        expected = [by_loop(policy, q, row) for q, own in zip(queries, rows, strict=True) for row in own]
    assert found == pytest.approx(expected, abs=1e-5)


def test_O5_multiple_choice_picks_the_likeliest_a_token():
    assert Weighed((-2.0, -3.0), (1, 3)).picked == 1  # -2 and -1 a token
    assert Weighed((-2.0, -3.0, -1.5), (1, 1, 1)).picked == 2
    assert Weighed((-2.0, -2.0), (1, 1)).picked == 0


def test_O5_entropy_of_a_binary_choice_in_bits():
    assert binary_entropy(0.5) == 1.0 and binary_entropy(0.0) == binary_entropy(1.0) == 0.0
    assert binary_entropy(0.25) == pytest.approx(2 - 0.75 * math.log2(3))
    assert Weighed((-7.0, -7.0), (3, 4)).first == 0.5
    assert Weighed((-7.0, -7.0 - math.log(3)), (1, 9)).first == pytest.approx(0.75)  # whole texts: not a token
    assert Weighed((-4000.0, -2.0), (1, 1)).first == 0.0


@given(st.floats(0, 1))
def test_O5_entropy_lies_between_0_and_1_bit(p):
    assert 0 <= binary_entropy(p) <= 1 and binary_entropy(p) == pytest.approx(binary_entropy(1 - p), abs=1e-9)


def test_the_report_by_hand(capsys):
    rows = [Choice("q", ("a", "b", "c"), (1,), {"source": "s"}), Choice("q", ("a", "b"), (0, 1), {"source": "s"})]
    rows += [Choice("r", ("a", "b"), (0,), {"source": "s"}), Choice(None, ("a", "b"), (), {"source": "a\n b"})] * 2
    rows += [Choice("alone", ("a", "b"), (0,), {"source": "one row has no interval"})]
    one, other = Weighed((-1.0, -2.0), (1, 1)), Weighed((-2.0, -1.0), (1, 1))
    three = Weighed((-9.0, -1.0, -2.0), (1, 1, 1))
    even, sure = Weighed((-5.0, -5.0), (2, 2)), Weighed((-5.0, -5.0 - math.log(3)), (2, 2))
    sft = [three, one, other, even, one, even, one]
    ppo = [three, other, one, sure, one, even, one]
    report = choices_report(rows, {"sft": sft, "ppo": ppo})
    assert list(report) == ["s", "a b (pairs)"]
    assert "one row has no interval: one row has no interval, left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="no source has two rows of a kind"):
        choices_report(rows[-1:], {"sft": sft[-1:]})
    choice, pairs = report["s"], report["a b (pairs)"]
    assert choice["rows"] == 4 and choice["chance"] == pytest.approx((1 / 3 + 1 + 1 / 2 + 1 / 2) / 4)
    assert (choice["policies"]["sft"]["accuracy"].mean, choice["policies"]["ppo"]["accuracy"].mean) == (0.75, 1.0)
    assert choice["policies"]["ppo"]["gain_vs_sft"].mean == 0.25
    bits = 2 - 0.75 * math.log2(3)
    assert pairs["policies"]["ppo"]["entropy"].mean == pytest.approx((1 + bits) / 2)
    assert pairs["policies"]["ppo"]["gain_vs_sft"].mean == pytest.approx((bits - 1) / 2)
    assert (pairs["policies"]["sft"]["prefers_first"].mean, pairs["policies"]["ppo"]["prefers_first"].mean) == (0, 0.5)
    close(choice["policies"]["sft"]["accuracy"], 0.75, 0.30064, 0.95441)  # Wilson's, of 3 in 4
