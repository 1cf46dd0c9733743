"""align/models.py: heads, scores, dropout, forward passes over responses, the weight average."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from align.attention import PACKED
from align.errors import UserError
from align.lora import with_lora
from align.manifest import published_manifest, write_manifest
from align.models import (
    EMA,
    Policy,
    add_residual_dropout,
    context_of,
    disable_dropout,
    document_nll,
    has_plain_head,
    load_packed_policy,
    load_policy,
    load_scalar_model,
    pack_responses,
    refuse_adapter,
    require_context,
    response_logprobs,
    response_values,
    row_limit,
    save_scalar_model,
)
from align.packing import pack_rows
from align.ranking import normalise, score_rows
from align.text import Codec

PAD, EOS = 0, 1
LORA = SimpleNamespace(lora_r=4, lora_alpha=8, lora_target_modules=())
ROWS = [[5, 6, 7, 1], [9, 1], [30, 31, 32, 33, 34, 35, 36, 1], [8, 60, 1], [44, 45, 46, 47, 48, 1]]


@pytest.fixture
def policy_folder(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


@pytest.fixture(params=[None, "eager"], ids=["packed", "padded"])
def scalar(request, policy_folder):
    model = load_scalar_model(policy_folder, request.param, fresh_head=True).eval()
    assert model.packed == (request.param is None)
    with torch.no_grad():
        model.head.bias.fill_(0.7)
    return model


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def policy(request, tiny_llama):
    policy = Policy(tiny_llama, request.param)
    assert policy.packed == request.param
    return policy


def pad(rows, value=PAD, extra=0):
    width = max(map(len, rows)) + extra
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def sizes(rows):
    return torch.tensor([len(row) for row in rows])


def one_by_one(model, rows) -> list[float]:
    """Scores at the last token by transformers' backbone, a row at a time."""
    with torch.no_grad():
        states = [model.inner.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        return [float(model.head.weight[0].double() @ state.double() + model.head.bias[0]) for state in states]


def test_R7_fresh_head(tmp_path):
    size = 4096
    config = LlamaConfig(
        vocab_size=8, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=64,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    torch.manual_seed(3)
    head = load_scalar_model(str(tmp_path), "eager", fresh_head=True).head
    assert head.weight.shape == (1, size) and head.bias.tolist() == [0.0]
    numbers = head.weight[0].double()
    std = math.sqrt(float(((numbers - numbers.mean()) ** 2).sum()) / (size - 1))
    assert std == pytest.approx(1 / math.sqrt(size + 1), rel=0.05)
    assert abs(float(numbers.mean())) < 4 / size  # 4 standard errors


def test_D2_prompt_and_response_just_fit_the_context(policy_folder):
    context = context_of(policy_folder)
    require_context(policy_folder, context - 9, 9)
    with pytest.raises(UserError, match=f"over the {context} tokens"):
        require_context(policy_folder, context - 9, 10)


def test_R7_the_bias_is_counted_among_a_heads_inputs(policy_folder, monkeypatch):
    """1 / sqrt(d + 1), told from 1 / sqrt(d) where d is small."""
    asked, normal = [], torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x, *a, **k: (asked.append(k), normal(x, *a, **k))[1])
    size = load_scalar_model(policy_folder, fresh_head=True).head.in_features
    assert asked[-1] == {"std": pytest.approx(1 / math.sqrt(size + 1), rel=1e-9)}


def test_a_fresh_head_needs_the_seed_alone(policy_folder):
    torch.manual_seed(5)
    first = load_scalar_model(policy_folder, fresh_head=True).head.weight.clone()
    torch.manual_seed(5)
    assert torch.equal(first, load_scalar_model(policy_folder, fresh_head=True).head.weight)


@pytest.mark.parametrize("extra, junk", [(0, PAD), (7, PAD), (3, 59), (3, EOS)])
def test_R8_score_under_padding_and_batch_mates(scalar, extra, junk):
    expected = one_by_one(scalar, ROWS)
    with torch.no_grad():
        # Out of padded rows, at the state after the last token, as the step-zero check reads it.
        scores = response_values(scalar, pad(ROWS, junk, extra), sizes(ROWS), torch.ones(5, dtype=torch.long))
        assert scores[:, 0].tolist() == pytest.approx(expected, abs=1e-4)
        pack = pack_rows(ROWS, junk, max_padding=0.99)  # one group, padded to its longest row
        assert len(pack.parts) == 1 and len(pack.input_ids) == 5 * 8 > sum(map(len, ROWS))
        scores = scalar(pack, pack.starts + sizes(ROWS) - 1)
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert len({round(x, 3) for x in expected}) == len(ROWS), "scores that are all alike prove nothing"


@pytest.mark.parametrize("tokens", [None, 1, 12])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_R8_batches_keep_their_order(scalar, size, tokens):
    assert score_rows(scalar, ROWS, PAD, size, tokens) == pytest.approx(one_by_one(scalar, ROWS), abs=1e-4)


def test_R8_equals_a_stock_sequence_classifier_up_to_the_bias(scalar, tmp_path):
    expected = one_by_one(scalar, ROWS)
    save_scalar_model(scalar, tmp_path, PAD)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        single = [float(stock(torch.tensor([row])).logits[0, 0]) + 0.7 for row in ROWS]
        batch = (stock(pad(ROWS), attention_mask=(pad(ROWS) != PAD).long()).logits[:, 0] + 0.7).tolist()
        left = torch.tensor([[PAD] * (8 - len(row)) + row for row in ROWS])
        position_ids = ((left != PAD).long().cumsum(-1) - 1).clamp(min=0)
        left_padded = stock(left, attention_mask=(left != PAD).long(), position_ids=position_ids).logits[:, 0] + 0.7
    assert single == pytest.approx(expected, abs=1e-4) and batch == pytest.approx(expected, abs=1e-4)
    assert left_padded.tolist() == pytest.approx(expected, abs=1e-4)


def test_R8_a_stock_token_classifier_reads_the_very_same_scores(scalar, tmp_path):
    expected = one_by_one(scalar, ROWS)
    save_scalar_model(scalar, tmp_path, PAD)
    stock, info = AutoModelForTokenClassification.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        scores = [float(stock(torch.tensor([row])).logits[0, -1, 0]) for row in ROWS]
    assert scores == pytest.approx(expected, abs=1e-6)


def test_R9_normalised_demonstrations_score_0(scalar, tmp_path):
    before = one_by_one(scalar, ROWS)
    returned = normalise(scalar, before)
    after = one_by_one(scalar, ROWS)
    assert returned == pytest.approx(sum(before) / 5)
    assert sum(after) / 5 == pytest.approx(0, abs=1e-5)
    order = sorted(range(5), key=before.__getitem__)
    assert order == sorted(range(5), key=after.__getitem__)
    gaps = [(a - before[0]) - (b - after[0]) for a, b in zip(before, after, strict=True)]
    assert gaps == pytest.approx([0] * 5, abs=1e-6), "differences, and so the variance, stay"
    save_scalar_model(scalar, tmp_path, PAD)
    assert one_by_one(load_scalar_model(str(tmp_path), "eager").eval(), ROWS) == pytest.approx(after, abs=1e-6)


def test_R9_a_second_round_trip_keeps_the_bias(scalar, tmp_path):
    save_scalar_model(scalar, tmp_path / "a", PAD)
    save_scalar_model(load_scalar_model(str(tmp_path / "a"), "eager"), tmp_path / "b", PAD)
    assert float(load_scalar_model(str(tmp_path / "b"), "eager").head.bias) == pytest.approx(0.7)


def test_a_policy_is_no_reward_model(policy_folder):
    with pytest.raises(UserError, match="no head `score`"):
        load_scalar_model(policy_folder)


def test_no_model_at_all(tmp_path):
    with pytest.raises(UserError, match="no model could be loaded"):
        load_policy(str(tmp_path))


def test_lora_reward_model_is_saved_merged(scalar, tmp_path):
    scalar.model = with_lora(scalar.model, LORA)
    with torch.no_grad():
        for name, parameter in scalar.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    normalise(scalar, [-0.5])
    expected = one_by_one(scalar.eval(), ROWS)
    assert score_rows(scalar, ROWS, PAD, 2) == pytest.approx(expected, abs=1e-4)
    save_scalar_model(scalar, tmp_path / "rm", PAD)
    assert one_by_one(load_scalar_model(str(tmp_path / "rm"), "eager").eval(), ROWS) == pytest.approx(
        expected, abs=1e-4
    )


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_S4_residual_dropout_acts_in_training_mode_only(tiny_llama):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    plain = logits(tiny_llama, ids)
    assert add_residual_dropout(tiny_llama, 0.2) == 4, "two a block: attention and feed-forward"
    assert torch.equal(logits(tiny_llama.eval(), ids), plain)
    assert torch.equal(logits(tiny_llama, ids), logits(tiny_llama, ids)), "two eval passes are bit-equal"
    tiny_llama.train()
    assert not torch.equal(logits(tiny_llama, ids), logits(tiny_llama, ids))
    assert torch.equal(logits(tiny_llama.eval(), ids), plain)


def test_S4_residual_dropout_drops_the_share_asked_for(tiny_llama):
    add_residual_dropout(tiny_llama, 0.2)
    seen = []
    tiny_llama.model.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call[2]))
    tiny_llama.train()(input_ids=torch.randint(2, 64, (8, 64)))
    assert float((seen[0] == 0).float().mean()) == pytest.approx(0.2, abs=0.02)


def test_S4_residual_dropout_drops_what_an_adapter_writes_too(tiny_llama):
    adapted = with_lora(tiny_llama, LORA)
    assert add_residual_dropout(adapted, 1.0) == 4
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    seen = []
    adapted.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(
        lambda *call: seen.append(call[2])
    )
    adapted.train()(input_ids=torch.tensor([[5, 6, 7]]))
    adapted.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    assert float(seen[0].abs().max()) == 0 and float(seen[1].abs().max()) > 0


def test_an_adapter_does_not_go_on_an_adapter(tiny_llama, tmp_path):
    """Saved, the second would name the first one's base, and the first be lost."""
    tiny_llama.save_pretrained(tmp_path / "base")
    refuse_adapter(str(tmp_path / "base"))
    with_lora(load_policy(str(tmp_path / "base")), LORA).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter is an adapter; merge it into its base first, or set use_peft: false"):
        refuse_adapter(str(tmp_path / "adapter"))
    merged = load_policy(str(tmp_path / "adapter"))
    assert all(p.requires_grad for p in merged.parameters()), "merged, it can be trained whole"


def test_another_attention_that_is_not_installed_is_one_line(policy_folder):
    with pytest.raises(UserError, match="attn_implementation: flash_attention_2: "):
        load_policy(policy_folder, "flash_attention_2")


def test_tokens_without_an_embedding_are_named(tiny_llama, tiny_codec, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    codec = Codec(copy.deepcopy(tiny_codec.tokenizer))
    size = len(codec.tokenizer)
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_llama.config.to_dict(), "vocab_size": size}))
    codec.tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    model.save_pretrained(tmp_path)
    codec.save(tmp_path)
    with pytest.raises(UserError, match=r"has 1 tokens, such as '<\|new\|>', beyond the .*resize_token_embeddings"):
        Codec.load(str(tmp_path))
    model.resize_token_embeddings(size + 1)
    model.save_pretrained(tmp_path)
    assert len(Codec.load(str(tmp_path)).tokenizer) == size + 1


def test_S4_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="residual_dropout"):
        add_residual_dropout(torch.nn.Linear(2, 2), 0.2)


def test_disable_dropout(tiny_llama):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    plain = logits(tiny_llama, ids)
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
    assert not torch.equal(logits(tiny_llama.train(), ids), plain)
    disable_dropout(tiny_llama)
    assert torch.equal(logits(tiny_llama.train(), ids), plain)


# Log-probabilities and values of responses


QUERIES = [[5, 6], [9], [30, 31, 32, 33], [8, 60, 2]]
RESPONSES = [[7, 8, 1], [10, 11, 12, 13, 14], [1], [3, 4]]


def naive(policy, temperature) -> list[list[float]]:
    """transformers' own logits, one row at a time, no padding, softmax in float64."""
    out = []
    for query, response in zip(QUERIES, RESPONSES, strict=True):
        scores = policy.inner(input_ids=torch.tensor([query + response])).logits[0].double() / temperature
        steps = range(len(query) - 1, len(query) + len(response) - 1)
        out.append([scores[t, token] - scores[t].exp().sum().log() for t, token in zip(steps, response, strict=True)])
    return out


def batch(junk=PAD, extra=0, order=(0, 1, 2, 3)):
    rows = [QUERIES[i] + RESPONSES[i] for i in order]
    return pad(rows, junk, extra), sizes([QUERIES[i] for i in order]), sizes([RESPONSES[i] for i in order])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_P5_logprobs_are_those_of_single_rows(policy, temperature):
    expected = naive(policy, temperature)
    for junk, extra, order in ((PAD, 0, (0, 1, 2, 3)), (PAD, 9, (3, 1, 0, 2)), (EOS, 4, (2, 0, 1, 3)), (0, 0, (2, 0))):
        logprobs, entropies = response_logprobs(policy, *batch(junk, extra, order), temperature, with_entropies=True)
        assert logprobs.shape == (len(order), max(len(RESPONSES[i]) for i in order))
        for row, i in enumerate(order):
            n = len(RESPONSES[i])
            assert logprobs[row, :n].tolist() == pytest.approx([float(x) for x in expected[i]], abs=1e-4)
            assert not logprobs[row, n:].any() and not entropies[row, n:].any()


def test_P5_entropy_is_that_of_the_whole_distribution(policy):
    _, entropies = response_logprobs(policy, *batch(), 0.5, with_entropies=True)
    assert response_logprobs(policy, *batch(), 0.5)[1] is None
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        scores = logits(policy.inner, torch.tensor([query + response]))[0].double() / 0.5
        for r in range(len(response)):
            p = scores[len(query) - 1 + r].softmax(-1).tolist()
            assert float(entropies[i, r]) == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-4)


def gradient(policy, *rows):
    logprobs, _ = response_logprobs(policy, *rows, 1.0)
    mask = torch.arange(5)[None, :] < torch.tensor([len(r) for r in RESPONSES])[:, None]
    return torch.autograd.grad(torch.where(mask, logprobs, torch.zeros_like(logprobs)).sum(), list(policy.parameters()))


def test_P5_junk_in_the_padding_changes_no_logprob_and_no_gradient(policy):
    clean, dirty = gradient(policy, *batch()), gradient(policy, *batch(junk=57))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    alone = torch.autograd.grad(sum(sum(row) for row in naive(policy, 1.0)), list(policy.parameters()))
    assert max(float((a - b).abs().max()) for a, b in zip(clean, alone, strict=True)) < 1e-4


# The three rows of align.maths.masks: queries of two; ends with EOS (9), only EOS, never ends.
WORKED = [[5, 6, 7, 8, 9], [5, 6, 9], [5, 6, 7, 8, 7, 8]]


def test_the_states_before_response_tokens_golden():
    pack, mask, at = pack_responses(pad(WORKED), torch.tensor([2, 2, 2]), torch.tensor([3, 1, 4]))
    # the first response token sits at index 2 and is drawn from the state at index 1
    assert pack.position_ids[at].tolist() == [1, 2, 3, 1, 1, 2, 3, 4]
    assert pack.input_ids[at].tolist() == [6, 7, 8, 6, 6, 7, 8, 7]
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False], [True, True, True, True]]


tokens = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5), st.integers(0, 60))
def test_the_states_before_response_tokens_of_ragged_rows(pairs, junk):
    rows = [query + response for query, response in pairs]
    pack, mask, at = pack_responses(pad(rows, junk), sizes([q for q, _ in pairs]), sizes([r for _, r in pairs]))
    before = iter(pack.input_ids[at].tolist())
    assert [[next(before) for _ in r] for _, r in pairs] == [(q + r)[len(q) - 1 : -1] for q, r in pairs]
    assert next(before, None) is None and mask.sum(1).tolist() == [len(r) for _, r in pairs]
    # Each once, in its own row: no state serves two tokens.
    assert len(set(at.tolist())) == len(at)
    places = iter(at.tolist())
    for start, row, (_, response) in zip(pack.starts.tolist(), rows, pairs, strict=True):
        assert all(start <= next(places) < start + len(row) - 1 for _ in response)


def test_exactly_the_states_before_response_tokens_get_gradient():
    states = torch.zeros(3, 6, requires_grad=True)
    pack, _, at = pack_responses(pad(WORKED), torch.tensor([2, 2, 2]), torch.tensor([3, 1, 4]))
    flat = torch.zeros(len(pack.input_ids))
    for row, start in enumerate(pack.starts.tolist()):
        width = len(WORKED[row])
        flat = flat.index_copy(0, torch.arange(start, start + width), states[row, :width])
    flat[at].sum().backward()
    expected = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]])
    assert torch.equal(states.grad, expected.float()), "the last token's state predicts nothing"


def test_values_are_read_before_each_token(scalar):
    with torch.no_grad():
        values = response_values(scalar, *batch(junk=57, extra=2))
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        assert not values[i, len(response) :].any()
        for r in range(len(response)):
            assert float(values[i, r]) == pytest.approx(one_by_one(scalar, [query + response[:r]])[0], abs=1e-4)


def test_the_loss_of_documents_is_that_of_transformers(policy):
    documents = [query + response for query, response in zip(QUERIES, RESPONSES, strict=True)]
    total = 0.0
    for document in documents:
        ids = torch.tensor([document])
        total = total + policy.inner(input_ids=ids, labels=ids).loss.double() * (len(document) - 1)
    loss = document_nll(policy, documents, torch.device("cpu"))
    assert float(loss.detach()) == pytest.approx(float(total.detach()), abs=1e-4)
    ours, theirs = (torch.autograd.grad(x, list(policy.parameters())) for x in (loss, total))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_the_loss_of_a_padded_batch_is_that_of_transformers(tiny_llama):
    ids = torch.randint(64, (3, 10))
    lengths = [10, 4, 7]
    mask = torch.arange(10)[None] < torch.tensor(lengths)[:, None]
    expected = tiny_llama(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss.item()
    for packed in (False, True):
        documents = [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)]
        loss = document_nll(Policy(tiny_llama, packed), documents, torch.device("cpu"))
        assert loss.item() / (9 + 3 + 6) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_documents_golden(policy):
    """A head of zeros is uniform over 64 tokens: each but a document's first costs ln 64."""
    torch.nn.init.zeros_(policy.inner.lm_head.weight)
    loss = document_nll(policy, [[5, 6, 7, 1], [9], [8, 60]], torch.device("cpu"))
    assert loss.item() == pytest.approx((3 + 0 + 1) * math.log(64), rel=1e-6)


def test_documents_of_one_token_have_no_loss(policy):
    """The first token is not predicted, so there is nothing to learn from a document that has no other."""
    rest = document_nll(policy, [[5, 6, 7]], torch.device("cpu"))
    assert float(document_nll(policy, [[9], [5, 6, 7]], torch.device("cpu"))) == pytest.approx(float(rest), abs=1e-5)
    assert float(document_nll(policy, [[9], [5]], torch.device("cpu"))) == 0


def test_a_policy_reads_packs_unless_another_attention_is_asked_for(policy_folder):
    packed, padded = load_packed_policy(policy_folder), load_packed_policy(policy_folder, "eager")
    assert packed.packed and packed.inner.config._attn_implementation == PACKED
    assert not padded.packed and padded.inner.config._attn_implementation == "eager"
    ours, theirs = (response_logprobs(p.eval(), *batch(), 1.0)[0] for p in (packed, padded))
    assert float((ours - theirs).abs().max()) < 1e-5 and float(ours.abs().max()) > 1


def test_a_saved_policy_names_no_attention_of_ours(policy_folder, tmp_path):
    """What a packed policy writes must load where align is not installed."""
    load_packed_policy(policy_folder).model.save_pretrained(tmp_path / "again")
    assert PACKED not in (tmp_path / "again" / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config._attn_implementation != PACKED


# The weight average


def test_P15_average_by_a_loop(tiny_llama):
    ema = EMA(tiny_llama, 0.992)
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = tiny_llama.get_parameter(name).detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            for parameter in tiny_llama.parameters():
                parameter.add_(0.1 * math.sin(step))
        ema.update(tiny_llama)
        expected = 0.992 * expected + 0.008 * tiny_llama.get_parameter(name).detach().double()
    assert float((ema.shadow[name].double() - expected).abs().max()) < 1e-6
    trained = copy.deepcopy(tiny_llama.state_dict())
    ema.copy_to(tiny_llama)
    assert torch.equal(tiny_llama.get_parameter(name), ema.shadow[name])
    assert not torch.equal(trained[name], tiny_llama.state_dict()[name])


def test_P15_the_average_takes_the_models_place_and_gives_it_back(tiny_llama):
    ema = EMA(tiny_llama, 0.5)
    name = "lm_head.weight"
    before = tiny_llama.lm_head.weight.detach().clone()
    with torch.no_grad():
        tiny_llama.lm_head.weight.add_(1.0)
    ema.update(tiny_llama)
    average, trained = ema.shadow[name].clone(), tiny_llama.lm_head.weight.detach().clone()
    assert torch.allclose(average, before + 0.5)
    with pytest.raises(KeyboardInterrupt), ema.swapped(tiny_llama):
        assert torch.equal(tiny_llama.lm_head.weight, average) and torch.equal(ema.shadow[name], trained)
        raise KeyboardInterrupt
    assert torch.equal(tiny_llama.lm_head.weight, trained) and torch.equal(ema.shadow[name], average)


def test_P15_constant_weights_are_a_fixed_point(tiny_llama):
    ema = EMA(tiny_llama, 0.992)
    for _ in range(50):
        ema.update(tiny_llama)
    assert all(torch.equal(value, tiny_llama.get_parameter(name)) for name, value in ema.shadow.items())


def test_P15_the_average_is_a_copy(tiny_llama):
    ema = EMA(tiny_llama, 0.9)
    name = "lm_head.weight"
    before = ema.shadow[name].clone()
    with torch.no_grad():
        tiny_llama.lm_head.weight.add_(1.0)
    assert torch.equal(ema.shadow[name], before)


def test_disable_dropout_of_a_model_that_keeps_a_number_and_calls_the_function():
    """OPT's layers have no dropout modules."""
    sizes = dict(vocab_size=64, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_attention_heads=2)
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=2, max_position_embeddings=32, dropout=0.5, **sizes))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    plain = logits(model.eval(), ids)
    assert not torch.equal(logits(model.train(), ids), plain)
    disable_dropout(model)
    assert torch.equal(logits(model.train(), ids), plain)


def test_scores_in_half_precision_are_not_rounded_to_it(scalar):
    """20 is followed by 20.125 in bfloat16: scores that differ by less would be ties."""
    with torch.no_grad():
        scalar.head.bias.fill_(20.0)
    exact = one_by_one(scalar, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        half = score_rows(scalar, ROWS, PAD, len(ROWS))
    assert half == pytest.approx(exact, abs=0.03) and len(set(half)) == len(set(exact))
    assert any(score != float(torch.tensor(score).bfloat16()) for score in half)


def test_a_limit_over_what_the_model_reads_is_lowered_and_said(policy_folder, capsys):
    assert row_limit(policy_folder, "max_length", 2048) == 128
    assert capsys.readouterr().out == f"max_length: 2048, but {policy_folder} reads 128 tokens: that is the limit\n"
    assert row_limit(policy_folder, "max_length", 12) == 12
    assert capsys.readouterr().out == ""


def test_a_reward_model_of_the_hub_keeps_its_bias(scalar, tmp_path, monkeypatch):
    """transformers' class has no place for it, so that it loads without a word, and 0.7 lower."""
    snapshot = tmp_path / "hub" / "models--me--rm" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    save_scalar_model(scalar, snapshot, PAD)
    write_manifest(snapshot, "rm", {}, 0)
    refs = tmp_path / "hub" / "models--me--rm" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    expected = one_by_one(scalar, ROWS)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.constants.HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path / "hub"))
    loaded = load_scalar_model("me/rm", "eager").eval()
    assert float(loaded.head.bias) == pytest.approx(0.7) and one_by_one(loaded, ROWS) == pytest.approx(expected)
    assert published_manifest("me/rm").stage == "rm" and published_manifest("me/none") is None


def test_a_scaled_heads_logits_are_made_where_they_are_asked_for():
    """Granite's own head, which divides: 2 of 9 positions, and not a (T, V) table of which most is thrown away."""
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)).eval()
    table = logits(model, torch.tensor([[5, 6, 7, 8, 9, 3, 4, 2, 1]]))[0]
    policy, read = Policy(copy.deepcopy(model)), []
    policy.inner.lm_head.register_forward_hook(lambda module, inputs, _: read.append(inputs[0].shape[1]))
    pack, at = pack_rows([[5, 6, 7, 8, 9, 3, 4, 2, 1]]), torch.tensor([3, 7])
    logprobs, _ = policy(pack, at, torch.tensor([9, 1]), 1.0)
    expected = table.double().log_softmax(-1)[at, torch.tensor([9, 1])]
    assert logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-5) and read == [2]
    with torch.no_grad(), policy.decoding() as decode:
        found = decode(pack.input_ids, pack.position_ids, pack, at)
    assert torch.allclose(found, table[at], atol=1e-5) and read == [2, 2]


def test_a_model_that_is_its_own_base_has_no_plain_head(tiny_llama):
    class Whole(type(tiny_llama)):  # Llama 4's is
        base_model = property(lambda self: self)

    tiny_llama.__class__ = Whole
    assert not has_plain_head(tiny_llama)


def test_S4_a_mixture_of_experts_is_refused():
    """Its experts are one module with weights of three dimensions: a hook on down_proj would reach attention alone."""
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(UserError, match="residual_dropout: experts"):
        add_residual_dropout(MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)), 0.2)


def test_an_architecture_without_a_classifier_is_named(tmp_path):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    GraniteForCausalLM(GraniteConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no sequence classifier of this kind .granite.; start the reward"):
        load_scalar_model(str(tmp_path), fresh_head=True)


def test_a_wrapped_model_is_in_the_mode_it_was_in(tiny_llama):
    assert not Policy(tiny_llama.eval()).training and Policy(tiny_llama.train()).training
