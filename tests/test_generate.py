"""align/generate.py: sampling against transformers' generate, and its independence of batches."""

import copy
import gc
import random
import weakref

import pytest
import torch
from scipy.stats import chisquare
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen3Config

from align import generate
from align.generate import GenerateSampler, TorchSampler, make_sampler, uniform_numbers
from align.models import Decoder, Policy, response_logprobs

PAD, EOS = 0, 1
QUERIES = [[5], [6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21], [33, 3, 44, 45], [60, 61, 62, 63, 50, 51, 52], [5, 6]]


def opinionated(model):
    """Far from uniform, and now and then at its end."""
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(15)
        head[EOS] = head[[7, 20, 33]].mean(0) * 1.5
    return model


@pytest.fixture
def llama(tiny_llama):
    """transformers' own, with its own attention."""
    return opinionated(tiny_llama)


@pytest.fixture
def policy(llama):
    policy = Policy(copy.deepcopy(llama))
    assert policy.packed
    return policy


def sample(policy, queries, uniforms, batch_size=8, temperature=1.0, engine=TorchSampler):
    return engine(policy, EOS, PAD, batch_size)(queries, uniforms, temperature)


def restless(num: int, width: int) -> torch.Tensor:
    """Small numbers draw EOS, token 1, more often: responses of all lengths, so that slots free at different times."""
    return uniform_numbers(num, width, 5) ** 3


def tokens_of(episodes) -> list[tuple]:
    """What was drawn, without the log-probabilities, whose last bits batching may change."""
    return [(e.query, e.response, e.finished) for e in episodes]


def same(ours, theirs) -> bool:
    """The same tokens, and log-probabilities equal but for rounding."""
    if tokens_of(ours) != tokens_of(theirs):
        return False
    gap = [abs(x - y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    return max(gap) < 1e-4


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
def test_greedy_is_that_of_transformers(policy, llama, engine):
    ours = sample(policy, QUERIES, torch.zeros(len(QUERIES), 12), batch_size=3, temperature=0.0, engine=engine)
    ends = 0
    for query, episode in zip(QUERIES, ours, strict=True):
        theirs = llama.generate(
            torch.tensor([query]), max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
        )[0, len(query) :].tolist()
        assert list(episode.response) == theirs and list(episode.query) == query
        ends += theirs[-1] == EOS
    assert len({episode.response for episode in ours}) > 1 and ends < len(QUERIES)


def test_greedy_ignores_the_uniform_numbers(policy):
    a = sample(policy, QUERIES, torch.zeros(7, 8), temperature=0.0)
    assert same(a, sample(policy, QUERIES, torch.full((7, 8), 0.999), temperature=0.0))


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_batch_size_changes_no_token(policy, size, engine):
    for uniforms in (uniform_numbers(28, 10, 5), restless(28, 10)):
        whole = sample(policy, QUERIES * 4, uniforms, 8)
        assert same(sample(policy, QUERIES * 4, uniforms, size, engine=engine), whole)
    assert len({len(e.response) for e in whole}) > 5


def test_order_and_batch_mates_change_no_token(policy):
    queries = QUERIES * 4
    uniforms = uniform_numbers(len(queries), 10, 5)
    whole = sample(policy, queries, uniforms)
    order = list(range(len(queries)))
    random.Random(2).shuffle(order)
    shuffled = sample(policy, [queries[i] for i in order], uniforms[order], 5)
    assert same([whole[i] for i in order], shuffled)
    half = sample(policy, queries[1::2], uniforms[1::2])
    assert same(whole[1::2], half)


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
def test_eos_ends_a_response_and_is_kept_once(policy, engine):
    episodes = sample(policy, QUERIES * 20, uniform_numbers(140, 10, 1), engine=engine)
    finished = [e for e in episodes if e.finished]
    assert 10 < len(finished) < 130
    for episode in episodes:
        assert 1 <= len(episode.response) <= 10
        assert EOS not in episode.response[:-1] and episode.finished == (episode.response[-1] == EOS)
        assert episode.finished or len(episode.response) == 10
        assert len(episode.logprobs) == len(episode.response)


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_response_that_ends_at_once_is_eos_alone(policy, engine, size):
    with torch.no_grad():
        policy.inner.lm_head.weight.zero_()
    uniforms = torch.full((7, 4), 1.5 / 64)  # uniform over 64: the second token, EOS
    episodes = sample(policy, QUERIES, uniforms, size, engine=engine)
    assert [e.response for e in episodes] == [(EOS,)] * 7 and all(e.finished for e in episodes)
    assert [e.logprobs[0] for e in episodes] == pytest.approx([-4.158883] * 7, abs=1e-5)  # - ln 64
    # Every other query goes on with 30 until it may not: token 30 lies in [30 / 64, 31 / 64).
    uniforms[::2] = 30.5 / 64
    episodes = sample(policy, QUERIES, uniforms, size, engine=engine)
    assert [e.response for e in episodes] == [(30,) * 4 if i % 2 == 0 else (EOS,) for i in range(7)]
    assert [e.finished for e in episodes] == [i % 2 == 1 for i in range(7)]


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_one_new_token(policy, llama, engine, size):
    """The first token, out of transformers' logits and a numpy-like search in their cumulative shares."""
    uniforms = uniform_numbers(7, 1, 4)
    episodes = sample(policy, QUERIES, uniforms, size, engine=engine)
    for query, u, episode in zip(QUERIES, uniforms[:, 0].tolist(), episodes, strict=True):
        with torch.no_grad():
            shares = llama(torch.tensor([query])).logits[0, -1].double().softmax(-1).tolist()
        total, token = 0.0, -1
        while total <= u:
            token += 1
            total += shares[token]
        assert episode.response == (token,) and episode.finished == (token == EOS)
    assert len({e.response for e in episodes}) > 3


class Replayed:
    """As on a GPU, where every slot computes in each step, free ones too, and a step's tensors keep their places."""

    records = True

    def __init__(self, device):
        self.state = None

    def __call__(self, step):
        slots = step.__self__
        tensors = slots.query, slots.length, slots.count, slots.last, slots.tokens, *slots.cache.layers.values()
        assert self.state is None or all(a is b for a, b in zip(tensors, self.state, strict=True))
        step()
        self.state = tensors

    def forget(self):
        self.state = None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 3, 9, 100])
def test_steps_of_every_slot_change_no_token(policy, monkeypatch, size, temperature):
    monkeypatch.setattr(generate, "GPU_IDLE_SLOTS", 0.9)
    for uniforms in (uniform_numbers(28, 10, 5), restless(28, 10), uniform_numbers(28, 1, 5)):
        whole = sample(policy, QUERIES * 4, uniforms, size, temperature)
        with monkeypatch.context() as patch:
            patch.setattr(generate, "CudaGraphStep", Replayed)
            assert same(sample(policy, QUERIES * 4, uniforms, size, temperature), whole)


@pytest.mark.parametrize("replay", [generate.CudaGraphStep, Replayed])
def test_a_slot_that_stays_free_stays_in_the_cache(policy, monkeypatch, replay):
    """16 slots, 31 queries: one slot's response ends at its second token, all others at the tenth. The 15 queries that
    wait then take the other slots, and the first stays free for another ten steps."""
    monkeypatch.setattr(generate, "CudaGraphStep", replay)
    with torch.no_grad():
        policy.inner.lm_head.weight.zero_()  # uniform over 64: a number picks its token
    uniforms = torch.full((31, 10), 30.5 / 64)
    uniforms[15, 1] = 1.5 / 64  # EOS
    episodes = sample(policy, [[5]] * 31, uniforms, 16)
    assert [e.response for e in episodes] == [(30, EOS) if i == 15 else (30,) * 10 for i in range(31)]


def test_what_sampling_holds_goes_when_it_returns(policy, monkeypatch):
    """The cache is large; a circle of references would keep it until Python looks for such."""
    held = []
    monkeypatch.setattr(generate.Slots, "episodes", lambda self: held.append(weakref.ref(self)) or [])
    gc.disable()
    try:
        sample(policy, QUERIES, uniform_numbers(7, 4, 5))
        assert held[0]() is None
    finally:
        gc.enable()


def test_no_query_is_no_episode(policy):
    assert sample(policy, [], torch.zeros(0, 4)) == []


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_how_many_queries_are_read_at_once_changes_no_token(policy, monkeypatch, tokens):
    queries = QUERIES * 4
    uniforms = restless(28, 20)
    whole = sample(policy, queries, uniforms, 9)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", tokens)
    monkeypatch.setattr(generate, "IDLE_SLOTS", 0.5)
    assert same(sample(policy, queries, uniforms, 9), whole)


def test_long_queries_of_like_length_share_a_padded_group(policy, llama):
    """Lengths 25 to 30: what a group pads must not be read, and is written over by the response."""
    generator = torch.Generator().manual_seed(3)
    queries = [torch.randint(2, 64, (25 + i % 6,), generator=generator).tolist() for i in range(18)]
    uniforms = uniform_numbers(18, 12, 8)
    whole = sample(policy, queries, uniforms, 18)
    assert same(whole, sample(policy, queries, uniforms, 1))
    assert same(whole, sample(Policy(llama, packed=False), queries, uniforms, 5, engine=GenerateSampler))


def test_finished_rows_leave_their_slots_to_the_next_queries(policy):
    """Continuous batching: forward passes are far fewer than those of fixed batches, which wait for their longest."""
    passes = []
    read = Decoder.__call__

    def spy(self, input_ids, *rest):
        passes.append(len(input_ids))
        return read(self, input_ids, *rest)

    queries, uniforms = QUERIES * 8, restless(56, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "__call__", spy)
        episodes = sample(policy, queries, uniforms, 7)
    written = sum(len(e.response) for e in episodes)
    fixed = sum(max(len(e.response) for e in episodes[i : i + 7]) for i in range(0, 56, 7))
    assert written / 7 <= len(passes) < 0.75 * fixed


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_P6_frequencies_are_those_of_the_softmax(policy, llama, temperature, engine):
    count = 6000
    query = [20, 21]
    episodes = sample(policy, [query] * count, uniform_numbers(count, 1, 11), 2000, temperature, engine)
    with torch.no_grad():
        logits = llama(torch.tensor([query])).logits[0, -1].double()
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


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
def test_P6_frequencies_of_the_second_token_are_those_of_the_softmax(policy, llama, temperature, engine):
    """After the token that came first most often: what is kept of the query and of it is read."""
    count, query = 6000, [20, 21]
    episodes = sample(policy, [query] * count, uniform_numbers(count, 2, 11), 500, temperature, engine)
    firsts = [e.response[0] for e in episodes if len(e.response) == 2]
    first = max(set(firsts), key=firsts.count)
    with torch.no_grad():
        logits = llama(torch.tensor([[*query, first]])).logits[0, -1].double()
    seconds = [e.response[1] for e in episodes if e.response[0] == first]
    expected = ((logits / temperature).softmax(-1) * len(seconds)).tolist()
    often = sorted((i for i in range(64) if expected[i] >= 5), key=lambda i: -expected[i])
    observed, predicted = [seconds.count(i) for i in often], [expected[i] for i in often]
    observed[0] += len(seconds) - sum(observed)
    predicted[0] += len(seconds) - sum(predicted)
    assert len(often) > 5 and len(seconds) > 400 and chisquare(observed, predicted).pvalue > 1e-3


def test_P6_logprobs_of_the_training_forward_are_those_of_cached_decoding(policy, llama):
    """The distribution each token was drawn from, out of transformers' own cached generation scores."""
    episodes = sample(policy, QUERIES, uniform_numbers(7, 8, 3), temperature=0.8)
    for episode in episodes:
        query, response = list(episode.query), list(episode.response)
        ids = torch.tensor([query + response])
        with torch.no_grad():
            lengths = torch.tensor([len(query)]), torch.tensor([len(response)])
            ours = response_logprobs(policy, ids, *lengths, 0.8)[0][0]
            past, tokens, cached = None, torch.tensor([query]), []
            for token in response:
                out = llama(tokens, past_key_values=past, use_cache=True)
                past, tokens = out.past_key_values, torch.tensor([[token]])
                cached.append(float((out.logits[0, -1].double() / 0.8).log_softmax(-1)[token]))
        assert ours.tolist() == pytest.approx(cached, abs=1e-4)
        assert list(episode.logprobs) == pytest.approx(cached, abs=1e-4)


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_P4_logprobs_of_the_sampler_are_those_of_the_training_forward(policy, engine, temperature):
    episodes = sample(policy, QUERIES * 3, uniform_numbers(21, 12, 3), 4, temperature, engine)
    ids = pad_sequence([torch.tensor([*e.query, *e.response]) for e in episodes], batch_first=True)
    starts, lengths = (torch.tensor([len(getattr(e, name)) for e in episodes]) for name in ("query", "response"))
    with torch.no_grad():
        expected = response_logprobs(policy, ids, starts, lengths, temperature)[0]
    for episode, row in zip(episodes, expected, strict=True):
        assert list(episode.logprobs) == pytest.approx(row[: len(episode.response)].tolist(), abs=1e-4)
    assert min(min(e.logprobs) for e in episodes) < -1


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": PAD}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": EOS}
OTHERS = {
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),  # grouped key heads
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=7 + 9, bos_token_id=None,
                       eos_token_id=EOS, pad_token_id=PAD, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_by_the_engine_that_can_read_them(name):
    """Greedy, against transformers' generate; sampled, both engines, or the reference alone where no pack is read."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(OTHERS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    policy = Policy(copy.deepcopy(model))
    sampler = make_sampler(policy, EOS, PAD, 3)
    assert type(sampler) is (GenerateSampler if name == "gemma2" else TorchSampler)
    greedy = sampler(QUERIES, torch.zeros(7, 9), 0.0)
    for query, episode in zip(QUERIES, greedy, strict=True):
        theirs = model.generate(torch.tensor([query]), max_new_tokens=9, do_sample=False)[0, len(query) :].tolist()
        assert list(episode.response) == theirs
    uniforms = uniform_numbers(7, 9, 2)
    drawn = sampler(QUERIES, uniforms, 1.0)
    assert max(len(e.query) + len(e.response) for e in drawn) == 7 + 9, "up to the end of the context"
    assert same(drawn, GenerateSampler(Policy(model, packed=False), EOS, PAD, 100)(QUERIES, uniforms, 1.0))
    assert len({e.response for e in drawn}) > 5 and len({e.response for e in greedy}) > 1


def test_uniform_numbers_belong_to_the_seed_and_the_stream():
    a = uniform_numbers(50, 20, 1, 2)
    assert torch.equal(a, uniform_numbers(50, 20, 1, 2)) and a.shape == (50, 20)
    assert float(a.min()) >= 0 and float(a.max()) < 1
    others = [uniform_numbers(50, 20, *key) for key in ((1, 3), (2, 2), (1,), (1, 2, 0))]
    assert all(not torch.equal(a, other) for other in others)
    assert abs(float(a.mean()) - 0.5) < 0.04


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
@pytest.mark.parametrize(
    "habit", [{"repetition_penalty": 3.0}, {"min_new_tokens": 8}, {"suppress_tokens": [7, 20, 33]}]
)
def test_a_checkpoints_own_habits_of_generation_change_no_token(policy, engine, habit):
    """generation_config.json of many instruction models names penalties; PPO must draw from the policy itself."""
    uniforms = restless(28, 10)
    plain = sample(policy, QUERIES * 4, uniforms, 8)
    policy.inner.generation_config.update(**habit)
    assert same(sample(policy, QUERIES * 4, uniforms, 8, engine=engine), plain)


@pytest.mark.parametrize("engine", [TorchSampler, GenerateSampler])
def test_sampling_leaves_the_models_mode_and_gradients_alone(policy, engine):
    policy.train()
    sample(policy, QUERIES, uniform_numbers(7, 3, 0), engine=engine)
    assert policy.training and all(p.grad is None for p in policy.parameters())


def test_sampling_in_half_precision_sees_new_weights_each_time(policy):
    """Casts are kept within a call only: what is drawn after an update is drawn from the updated weights."""
    uniforms = uniform_numbers(7, 6, 1)
    with torch.autocast("cpu", torch.bfloat16):
        before = sample(policy, QUERIES, uniforms)
        with torch.no_grad():
            policy.inner.lm_head.weight.zero_()
        after = sample(policy, QUERIES, uniforms)
    assert all(x == pytest.approx(-4.158883, abs=1e-5) for e in after for x in e.logprobs)  # - ln 64
    assert tokens_of(before) != tokens_of(after)
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_equal_queries_are_read_once(policy):
    """K samples of a prompt, as rankings are collected: its tokens pass the model once, and every draw is as before."""
    repeated = [query for query in QUERIES for _ in range(4)]
    uniforms, read, call = restless(len(repeated), 12), [], Decoder.__call__

    def spy(self, input_ids, *rest):
        read.append(len(input_ids))
        return call(self, input_ids, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "__call__", spy)
        together = sample(policy, repeated, uniforms, len(repeated))
    assert read[0] < 1.3 * sum(map(len, QUERIES)), "with a little padding"
    one_by_one = [sample(policy, [query], uniforms[i : i + 1], 1)[0] for i, query in enumerate(repeated)]
    assert same(together, one_by_one) and len({e.response for e in together}) > 20
    assert same(sample(policy, repeated, uniforms, 5), one_by_one), "with slots that free one by one"
