"""align/generate.py: sampling against transformers' generate, and its independence of batches."""

import random

import pytest
import torch
from scipy.stats import chisquare

from align.generate import TorchSampler, left_pad, uniform_numbers
from align.models import response_logprobs

PAD, EOS = 0, 1
QUERIES = [[5], [6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21], [33, 3, 44, 45], [60, 61, 62, 63, 50, 51, 52], [5, 6]]


@pytest.fixture
def policy(tiny_llama):
    """Opinionated, and now and then at its end."""
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(15)
        tiny_llama.lm_head.weight[EOS] = tiny_llama.lm_head.weight[[7, 20, 33]].mean(0) * 1.5
    return tiny_llama


def sample(policy, queries, uniforms, batch_size=8, temperature=1.0):
    return TorchSampler(policy, EOS, PAD, batch_size)(queries, uniforms, temperature)


def test_greedy_is_that_of_transformers(policy):
    ours = sample(policy, QUERIES, torch.zeros(len(QUERIES), 12), batch_size=3, temperature=0.0)
    ends = 0
    for query, episode in zip(QUERIES, ours, strict=True):
        theirs = policy.generate(
            torch.tensor([query]), max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
        )[0, len(query) :].tolist()
        assert list(episode.response) == theirs and list(episode.query) == query
        ends += theirs[-1] == EOS
    assert len({episode.response for episode in ours}) > 1 and ends < len(QUERIES)


def test_greedy_ignores_the_uniform_numbers(policy):
    a = sample(policy, QUERIES, torch.zeros(7, 8), temperature=0.0)
    assert a == sample(policy, QUERIES, torch.full((7, 8), 0.999), temperature=0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_batch_size_changes_no_token(policy, size):
    queries = QUERIES * 4
    uniforms = uniform_numbers(len(queries), 10, 5)
    assert sample(policy, queries, uniforms, size) == sample(policy, queries, uniforms, 8)


def test_order_and_batch_mates_change_no_token(policy):
    queries = QUERIES * 4
    uniforms = uniform_numbers(len(queries), 10, 5)
    whole = sample(policy, queries, uniforms)
    order = list(range(len(queries)))
    random.Random(2).shuffle(order)
    shuffled = sample(policy, [queries[i] for i in order], uniforms[order], 5)
    assert [whole[i] for i in order] == shuffled
    half = sample(policy, queries[1::2], uniforms[1::2])
    assert whole[1::2] == half


def test_eos_ends_a_response_and_is_kept_once(policy):
    episodes = sample(policy, QUERIES * 20, uniform_numbers(140, 10, 1))
    finished = [e for e in episodes if e.finished]
    assert 10 < len(finished) < 130
    for episode in episodes:
        assert 1 <= len(episode.response) <= 10
        assert EOS not in episode.response[:-1] and episode.finished == (episode.response[-1] == EOS)
        assert episode.finished or len(episode.response) == 10


def test_a_response_that_ends_at_once_is_eos_alone(policy):
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    episodes = sample(policy, QUERIES, torch.full((7, 4), 1.5 / 64))  # uniform over 64: the second token, EOS
    assert [e.response for e in episodes] == [(EOS,)] * 7


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_P6_frequencies_are_those_of_the_softmax(policy, temperature):
    count = 6000
    query = [20, 21]
    episodes = sample(policy, [query] * count, uniform_numbers(count, 1, 11), 2000, temperature)
    with torch.no_grad():
        logits = policy(torch.tensor([query])).logits[0, -1].double()
    weights = torch.exp(logits / temperature - (logits / temperature).max())
    expected = (weights / weights.sum() * count).tolist()
    seen = [0] * 64
    for episode in episodes:
        seen[episode.response[0]] += 1
    often = sorted((i for i in range(64) if expected[i] >= 5), key=lambda i: -expected[i])
    observed, predicted = [seen[i] for i in often], [expected[i] for i in often]
    observed[0] += count - sum(observed)  # what is rare shares a bin with what is most common
    predicted[0] += count - sum(predicted)
    assert len(often) > 5 and chisquare(observed, predicted).pvalue > 1e-3


def test_P6_logprobs_of_the_training_forward_are_those_of_cached_decoding(policy):
    """The distribution each token was drawn from, out of transformers' own cached generation scores."""
    episodes = sample(policy, QUERIES, uniform_numbers(7, 8, 3), temperature=0.8)
    for episode in episodes:
        query, response = list(episode.query), list(episode.response)
        ids = torch.tensor([query + response])
        with torch.no_grad():
            ours = response_logprobs(policy, ids, torch.tensor([len(query)]), len(response), 0.8)[0][0]
            past, tokens, cached = None, torch.tensor([query]), []
            for token in response:
                out = policy(tokens, past_key_values=past, use_cache=True)
                past, tokens = out.past_key_values, torch.tensor([[token]])
                cached.append(float((out.logits[0, -1].double() / 0.8).log_softmax(-1)[token]))
        assert ours.tolist() == pytest.approx(cached, abs=1e-4)


def test_uniform_numbers_belong_to_the_seed_and_the_stream():
    a = uniform_numbers(50, 20, 1, 2)
    assert torch.equal(a, uniform_numbers(50, 20, 1, 2)) and a.shape == (50, 20)
    assert float(a.min()) >= 0 and float(a.max()) < 1
    others = [uniform_numbers(50, 20, *key) for key in ((1, 3), (2, 2), (1,), (1, 2, 0))]
    assert all(not torch.equal(a, other) for other in others)
    assert abs(float(a.mean()) - 0.5) < 0.04


def test_sampling_leaves_the_models_mode_and_gradients_alone(policy):
    policy.train()
    sample(policy, QUERIES, uniform_numbers(7, 3, 0))
    assert policy.training and all(p.grad is None for p in policy.parameters())


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
