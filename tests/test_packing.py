"""align/packing.py: a pack gives what its rows give one by one, in value and in gradient, model by model."""

import copy
import random
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.utils import _apply_to_tensors

from align import attention, packing
from align.lora import with_lora
from align.models import Policy, ScalarModel, load_scalar_model, response_logprobs
from align.packing import (
    BLOCK_TOKENS,
    MAX_PADDING,
    PACKED,
    Block,
    Group,
    Row,
    like_lengths,
    pack_continuations,
    pack_rows,
    packed_states,
    padded_states,
    rows_of,
    set_packed,
    token_batches,
)

CPU = torch.device("cpu")
LORA = SimpleNamespace(lora_r=4, lora_alpha=8, lora_target_modules=())
IDS = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SIZES = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}  # two query heads share a key head
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GEMMA2 = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8}
PACKABLE = {
    "llama": hf.LlamaConfig(**LLAMA),
    "qwen2": hf.Qwen2Config(**LLAMA),
    "qwen3": hf.Qwen3Config(**LLAMA, head_dim=8),
    "gpt2": hf.GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=128, **NO_DROPOUT),
    "gpt_neox": hf.GPTNeoXConfig(**SIZES, intermediate_size=64, rotary_pct=0.5),
    "mistral": hf.MistralConfig(**LLAMA, sliding_window=None),
    "a window that no row reaches": hf.MistralConfig(**LLAMA, sliding_window=128),
    "values of another size": hf.DeepseekV3Config(
        **(LLAMA | {"num_key_value_heads": 4}),
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        rope_interleave=False,
    ),
    "opt": hf.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, activation_dropout=0.0),
}
REFUSED = {
    "a window": hf.MistralConfig(**LLAMA, sliding_window=4),
    "gemma2": hf.Gemma2Config(**GEMMA2, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=None),
    "soft caps alone": hf.Gemma2Config(
        **GEMMA2, layer_types=["full_attention"] * 2, attn_logit_softcapping=2.0, final_logit_softcapping=None
    ),
    "positions as a bias": hf.BloomConfig(
        **IDS, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "attention twice a layer": hf.DiffLlamaConfig(**LLAMA),
    "sinks": hf.GptOssConfig(
        **(LLAMA | {"intermediate_size": 16}), head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["full_attention"] * 2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip
# Language models whose logits are more than a linear layer over their last hidden state.
BEYOND_THE_HEAD = {
    "gemma2": hf.Gemma2Config(**GEMMA2, sliding_window=4, final_logit_softcapping=2.0),
    "granite": hf.GraniteConfig(**LLAMA, logits_scaling=3.0),
    "cohere": hf.CohereConfig(**LLAMA, logit_scale=0.25),
}
EVERY = PACKABLE | REFUSED
LENGTHS = (40, 7, 1, 38, 12, 2, 39, 25, 11)  # 40, 39 and 38 share a group


def build(config) -> hf.PreTrainedModel:
    """A language model on its own (eager) attention, with weights large enough that attention and logits matter."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
            if "sinks" in name:
                parameter.fill_(2.0)
    return model


def rows(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 64) for _ in range(n)] for n in lengths]


def coefficients(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}


def same_gradient(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    """Names may differ by a wrapper's prefix; their order does not."""
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 1e-2, "a gradient of nothing proves nothing"
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(1.0, largest), name


def naive_logprobs(model, row: list[int], query: int, temperature: float) -> torch.Tensor:
    """Of the tokens after the first `query`, by the model's own logits, softmax in float64."""
    table = (model(input_ids=torch.tensor([row])).logits[0].double() / temperature).log_softmax(-1)
    return torch.stack([table[t - 1, row[t]] for t in range(query, len(row))])


def padded(rows: list[list[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


# A pack and its rows


@pytest.mark.parametrize("name", PACKABLE)
def test_states_of_a_pack_are_those_of_its_rows(name):
    model = build(PACKABLE[name]).eval()
    own = copy.deepcopy(model).base_model
    assert set_packed(model) and model.config._attn_implementation == PACKED
    pack = pack_rows(rows())
    with torch.no_grad():
        packed, as_rows = packed_states(model.base_model, pack), padded_states(own, pack)
        for start, row in zip(pack.starts.tolist(), rows(), strict=True):
            alone = own(input_ids=torch.tensor([row])).last_hidden_state[0]
            assert float((packed[start : start + len(row)] - alone).abs().max()) < 1e-5
            assert float((as_rows[start : start + len(row)] - alone).abs().max()) < 1e-5


def check_logprobs(own: hf.PreTrainedModel, policy: Policy, temperature: float = 0.8) -> None:
    """Against the model's own logits, a row at a time: log-probabilities, and the gradient of a sum of them."""
    texts = [row for row in rows() if len(row) > 1]
    queries = [max(1, len(row) // 3) for row in texts]
    counts = [len(row) - query for row, query in zip(texts, queries, strict=True)]
    weights = coefficients(sum(counts))
    lengths = torch.tensor(queries), torch.tensor(counts)
    ours = response_logprobs(policy, padded(texts), *lengths, temperature)[0]
    theirs = [naive_logprobs(own, row, query, temperature) for row, query in zip(texts, queries, strict=True)]
    for row, alone in zip(ours, theirs, strict=True):
        assert float((row[: len(alone)] - alone).abs().max()) < 1e-5
    flat = torch.cat([row[:n] for row, n in zip(ours, counts, strict=True)])
    same_gradient(gradient((flat * weights).sum(), policy), gradient((torch.cat(theirs) * weights).sum(), own))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", EVERY)
def test_logprobs_and_their_gradients_are_those_of_single_rows(name, packed):
    own = build(EVERY[name]).eval()
    check_logprobs(own, Policy(copy.deepcopy(own), packed))


@pytest.mark.parametrize("name", BEYOND_THE_HEAD)
def test_logprobs_are_those_of_the_models_own_logits(name):
    """Some architectures scale or cap what the head gives; a ratio of PPO and what is sampled must know it."""
    own = build(BEYOND_THE_HEAD[name]).eval()
    check_logprobs(own, Policy(copy.deepcopy(own)))


def naive_scores(scalar: ScalarModel, rows: list[list[int]]) -> torch.Tensor:
    """At each row's last token, by transformers' backbone, a row at a time."""
    states = [scalar.inner.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    return torch.stack([scalar.head.weight[0] @ state + scalar.head.bias[0] for state in states])


@pytest.fixture(scope="session")
def scalars(tmp_path_factory):
    """name, attention -> a fresh reward model of that architecture, as the stages load it."""
    folders = {}

    def load(name: str, attention: str | None) -> ScalarModel:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
            build(EVERY[name]).save_pretrained(folders[name])
        torch.manual_seed(2)
        return load_scalar_model(str(folders[name]), attention, fresh_head=True).eval()

    return load


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", EVERY)
def test_scores_and_their_gradients_are_those_of_single_rows(scalars, name, attention):
    scalar, own = scalars(name, attention), scalars(name, "eager")
    assert not own.packed and own.inner.config._attn_implementation == "eager"
    pack, weights = pack_rows(rows()), coefficients(len(LENGTHS))
    ours = scalar(pack, pack.starts + torch.tensor(LENGTHS) - 1)
    theirs = naive_scores(own, rows())
    assert ours.dtype == torch.float32 and len({round(x, 3) for x in theirs.tolist()}) == len(LENGTHS)
    assert float((ours - theirs).abs().max()) < 1e-5
    same_gradient(gradient((ours * weights).sum(), scalar), gradient((theirs * weights).sum(), own))


@pytest.mark.parametrize("name", PACKABLE)
def test_what_can_be_packed_is(name):
    assert set_packed(build(PACKABLE[name]))


def test_what_half_precision_rounds_off_in_a_deep_model_is_no_other_attention():
    """The frozen reference and reward are loaded in half precision; they must read packs where the policy does."""
    model = build(hf.LlamaConfig(**(LLAMA | {"num_hidden_layers": 16})))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "layers" in name:
                weight.mul_(4)
    assert set_packed(model.bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_pack_cannot_say_is_refused_and_left_as_it_was(name):
    model = build(REFUSED[name]).train()
    assert not set_packed(model) and model.training
    assert model.config._attn_implementation == "eager"
    assert all(module.config._attn_implementation == "eager" for module in model.modules() if hasattr(module, "config"))


@pytest.mark.parametrize("size", [2, 6])
def test_a_tiny_vocabulary_is_no_reason_to_fail(size):
    """The tokens of the probe must exist."""
    assert set_packed(build(hf.LlamaConfig(**(LLAMA | {"vocab_size": size}))))


# A prefix shared by K rows


@pytest.mark.parametrize("together", [0, BLOCK_TOKENS], ids=["groups", "blocks"])
@pytest.mark.parametrize("block", [attention.QUERY_BLOCK, 4])
@pytest.mark.parametrize("prefix", [0, 1, 30])
@pytest.mark.parametrize("k", range(2, 10))
def test_a_shared_prefix_gives_what_k_whole_rows_give(scalars, monkeypatch, k, prefix, block, together):
    """Two prompts, as groups or under one dense mask. Groups: with gradients by plain products, without them (rows
    longer than a block of queries) by the fused kernel."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(packing, "BLOCK_TOKENS", together)
    name = "llama" if k % 2 else "gpt2"  # rotary and absolute positions
    scalar, own = scalars(name, None), scalars(name, "eager")
    assert scalar.packed
    prompts = rows((prefix, 3), seed=k)
    answers = [rows([11 + i % 3 + 9 * (i == 1) for i in range(k)], seed=k + 1), rows((1, 4, 9), seed=k + 2)]
    whole = [prompt + answer for prompt, own_rows in zip(prompts, answers, strict=True) for answer in own_rows]
    pack = pack_continuations(prompts, answers)
    assert any(isinstance(part, Block) for part in pack.parts) == bool(together)
    last = pack.starts + torch.tensor([len(answer) for own_rows in answers for answer in own_rows]) - 1
    real = sum(map(len, prompts)) + sum(len(answer) for own_rows in answers for answer in own_rows)
    assert len(pack.input_ids) <= real / (1 - MAX_PADDING), "a prompt is computed once"

    theirs, weights = naive_scores(own, whole), coefficients(len(whole))
    ours = scalar(pack, last)
    assert float((ours - theirs).abs().max()) < 1e-5
    same_gradient(gradient((ours * weights).sum(), scalar), gradient((theirs * weights).sum(), own))
    with torch.no_grad():
        assert float((scalar(pack, last) - theirs).abs().max()) < 1e-5


def test_a_sharded_models_layers_share_what_a_pack_keeps():
    """FSDP's hook before a layer makes a new pack of the same numbers; on another device they are others."""
    pack = pack_continuations([(1, 2)], [[(3,), (4, 5)]])
    copied = _apply_to_tensors(lambda x: x, pack)
    assert copied is not pack and copied.sequences is pack.sequences
    moved = pack.to("meta")
    assert moved.kept is not pack.kept


def loop_over_sequences(query, key, value, ends, key_ends, longest, longest_key, *, scale, window_size, enable_gqa):
    """What torch's kernel for rows of any lengths promises, by its documentation, a sequence at a time."""
    assert window_size == (-1, 0) and enable_gqa == (key.shape[1] < query.shape[1])
    assert ends.dtype == key_ends.dtype == torch.int32 and (ends[-1], key_ends[-1]) == (len(query), len(key))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    spans = list(zip(pairwise(ends.tolist()), pairwise(key_ends.tolist()), strict=True))
    assert longest == max(b - a for (a, b), _ in spans) and longest_key == max(d - c for _, (c, d) in spans)
    out = []
    for (a, b), (c, d) in spans:
        ahead = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(ahead, float("-inf")).softmax(-1), value[c:d]))
    return torch.cat(out)


@pytest.mark.parametrize("together", [0, BLOCK_TOKENS], ids=["groups", "blocks"])
@pytest.mark.parametrize("prefix", [0, 1, 30])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pack_read_as_sequences_gives_what_whole_rows_give(scalars, monkeypatch, name, prefix, together):
    """As on a GPU, where one kernel reads the pack: padded groups, prefixes and rows of one token among them."""
    monkeypatch.setattr(packing, "BLOCK_TOKENS", together)
    scalar, own = scalars(name, None), scalars(name, "eager")
    monkeypatch.setattr(packing, "ragged_inputs", lambda *x: x)
    monkeypatch.setattr(attention, "varlen_attn", loop_over_sequences)
    prompts, answers = rows((prefix, 3)), [rows((40, 39, 38, 1), seed=1), rows((1, 4, 9), seed=2)]
    whole = [prompt + answer for prompt, own_rows in zip(prompts, answers, strict=True) for answer in own_rows]
    pack = pack_continuations(prompts, answers)
    last = pack.starts + torch.tensor([len(answer) for own_rows in answers for answer in own_rows]) - 1
    theirs, weights = naive_scores(own, whole), coefficients(len(whole))
    ours = scalar(pack, last)
    assert float((ours - theirs).abs().max()) < 1e-5
    same_gradient(gradient((ours * weights).sum(), scalar), gradient((theirs * weights).sum(), own))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_long_rows_are_attended_in_blocks(scalars, monkeypatch, name, gradients):
    """A block's queries see all before them and nothing after; the same numbers by both kernels."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    seen = []
    for path in ("block_attention", "fused_attention"):
        kernel = getattr(attention, path)
        monkeypatch.setattr(attention, path, lambda *x, kernel=kernel, path=path: (seen.append(path), kernel(*x))[1])
    scalar, own = scalars(name, None), scalars(name, "eager")
    pack = pack_rows(rows())
    with torch.set_grad_enabled(gradients):
        ours = scalar(pack, pack.starts + torch.tensor(LENGTHS) - 1)
    theirs = naive_scores(own, rows())
    assert float((ours - theirs).abs().max()) < 1e-5
    assert ours.requires_grad == gradients
    assert ("fused_attention" in seen) != gradients and seen.count("block_attention") > 2


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (6, 1)])
def test_both_kernels_are_attention_by_a_loop(prefix, heads, shared):
    """Softmax over what is seen, in float64, one query at a time."""
    count, length, size = 3, 9, 8
    generator = torch.Generator().manual_seed(prefix)
    query = torch.randn(count, length, heads, size, generator=generator)
    key, value = torch.randn(2, count, length, shared, size, generator=generator)
    before = tuple(torch.randn(2, prefix, shared, size, generator=generator)) if prefix else None
    expected = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(count):
        for t in range(length):
            for h in range(heads):
                j = h // (heads // shared)
                keys, values = key[b, : t + 1, j], value[b, : t + 1, j]
                if before:
                    keys, values = torch.cat([before[0][:, j], keys]), torch.cat([before[1][:, j], values])
                weights = (keys.double() @ query[b, t, h].double() * 0.3).softmax(0)
                expected[b, t, h] = weights @ values.double()
    for kernel in (attention.causal_attention, attention.fused_attention):
        assert float((kernel(query, key, value, before, 0.3) - expected).abs().max()) < 1e-5, kernel


# Layout


def test_layout_by_hand(monkeypatch):
    """A prompt of 5, completions of 2, 2 and 3 tokens: the longest lies first, `starts` is in the caller's order."""
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 0)
    pack = pack_continuations([[11, 12, 13, 14, 15]], [[[21, 22], [31, 32], [41, 42, 43]]])
    assert pack.input_ids.tolist() == [11, 12, 13, 14, 15, 41, 42, 43, 21, 22, 31, 32]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 5, 6]
    assert pack.starts.tolist() == [8, 10, 5]
    assert pack.rows == (Row(0, 5, 8, 2), Row(0, 5, 10, 2), Row(0, 5, 5, 3))
    assert pack.parts == (Group(0, 1, 5), Group(5, 1, 3, 0, 5), Group(8, 2, 2, 0, 5))
    ids, places = rows_of(pack)
    assert ids.tolist() == [
        [11, 12, 13, 14, 15, 21, 22, 0],
        [11, 12, 13, 14, 15, 31, 32, 0],
        [11, 12, 13, 14, 15, 41, 42, 43],
    ]
    none = [-1] * 5
    assert places.tolist() == [[*none, 8, 9, -1], [*none, 10, 11, -1], [*none, 5, 6, 7]]


def test_layout_of_plain_rows_by_hand():
    # 1 of 2 x 4 and 3 of 3 x 4 tokens are not too much, 6 of 16 are.
    pack = pack_rows([[5, 6], [7], [8, 9, 10, 11], [12, 13, 14]], 63, 0.34)
    assert pack.input_ids.tolist() == [8, 9, 10, 11, 12, 13, 14, 63, 5, 6, 63, 63, 7]
    assert pack.position_ids.tolist() == [0, 1, 2, 3] * 3 + [0]
    assert pack.starts.tolist() == [8, 12, 0, 4] and pack.parts == (Group(0, 3, 4), Group(12, 1, 1))
    ids, places = rows_of(pack)
    assert ids.tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [8, 9, 10, 11], [12, 13, 14, 0]]
    assert places.tolist() == [[8, 9, -1, -1], [12, -1, -1, -1], [0, 1, 2, 3], [4, 5, 6, -1]]


def test_layout_of_a_block_by_hand():
    """Two short prompts under one mask: o is seen."""
    pack = pack_continuations([[11, 12], [13]], [[[21], [31, 32]], [[41]]])
    assert pack.input_ids.tolist() == [11, 12, 21, 31, 32, 13, 41]
    assert pack.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1] and pack.starts.tolist() == [2, 3, 6]
    (block,) = pack.parts
    assert block.start == 0 and ["".join(" " if x else "o" for x in row) for row in block.unseen.tolist()] == [
        "o      ",
        "oo     ",
        "ooo    ",
        "oo o   ",
        "oo oo  ",
        "     o ",
        "     oo",
    ]


lengths_of = st.lists(st.integers(1, 300), min_size=1, max_size=60)
like = st.integers(1, 200).flatmap(lambda n: st.lists(st.integers(n, n + n // 10 + 2), min_size=1, max_size=60))


@given(lengths_of | like)
def test_groups_are_a_partition_with_little_padding(lengths):
    groups = list(like_lengths(lengths))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded, real = len(group) * max(lengths[i] for i in group), sum(lengths[i] for i in group)
        assert padded - real <= MAX_PADDING * padded + 1e-9
    for one, two in pairwise(groups):  # and no group is cut without need
        longest, real = lengths[one[0]], sum(lengths[i] for i in one) + lengths[two[0]]
        padded = (len(one) + 1) * longest
        assert padded - real > MAX_PADDING * padded - 1e-9


families = st.lists(st.tuples(st.integers(0, 30), lengths_of), min_size=1, max_size=4)
short = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=9
)


@given(families | short, st.sampled_from([0, 20, 60, 256]), st.integers(0, 9))
def test_a_pack_holds_every_row_once_in_the_callers_order(shape, together, seed):
    prompts = rows([prefix for prefix, _ in shape], seed)
    answers = [rows(lengths, seed + 1 + i) for i, (_, lengths) in enumerate(shape)]
    with mock.patch.object(packing, "BLOCK_TOKENS", together):
        pack = pack_continuations(prompts, answers, pad_id=0)
    expected = [(prompt, answer) for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    assert pack.starts.tolist() == [row.start for row in pack.rows]
    taken = []
    for row, (prompt, answer) in zip(pack.rows, expected, strict=True):
        own, before = range(row.start, row.start + row.length), range(row.prefix_start, row.prefix_start + len(prompt))
        assert pack.input_ids[own.start : own.stop].tolist() == answer and row.prefix_length == len(prompt)
        assert pack.input_ids[before.start : before.stop].tolist() == prompt
        assert pack.position_ids[own.start : own.stop].tolist() == [len(prompt) + t for t in range(len(answer))]
        assert pack.position_ids[before.start : before.stop].tolist() == list(range(len(prompt)))
        taken += own
    assert len(set(taken)) == len(taken)
    ends = [p.start + (len(p.unseen) if isinstance(p, Block) else p.rows * p.length) for p in pack.parts]
    assert [0, *ends] == [*(part.start for part in pack.parts), len(pack.input_ids)], "parts follow one another"
    assert all(len(part.unseen) <= together for part in pack.parts if isinstance(part, Block))
    real = sum(map(len, prompts)) + len(taken)
    assert len(pack.input_ids) - real <= MAX_PADDING * len(pack.input_ids) + 1e-9


@given(short)
def test_a_block_shows_each_token_its_prefix_and_its_row_up_to_itself(shape):
    """Token by token, out of the rows."""
    pack = pack_continuations(
        rows([prefix for prefix, _ in shape]), [rows(lengths, 1 + i) for i, (_, lengths) in enumerate(shape)]
    )
    seen = {}  # of each token that is not padding
    for prefix_start, prefix_length, start, length in pack.rows:
        before = list(range(prefix_start, prefix_start + prefix_length))
        seen |= {token: before[: i + 1] for i, token in enumerate(before)}
        seen |= {start + i: [*before, *range(start, start + i + 1)] for i in range(length)}
    for part in pack.parts:
        if not isinstance(part, Block):
            continue
        for i, row in enumerate(part.unseen.tolist()):
            assert [part.start + j for j, hidden in enumerate(row) if not hidden] == seen[part.start + i]


@given(lengths_of, st.integers(1, 20), st.none() | st.integers(1, 1000))
def test_token_batches_are_a_partition_within_their_limits(lengths, max_rows, max_tokens):
    batches = token_batches(lengths, max_rows, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths)
    for batch in batches:
        assert 1 <= len(batch) <= max_rows
        assert len(batch) == 1 or max_tokens is None or sum(lengths[i] for i in batch) <= max_tokens
    for one, two in pairwise(batches):  # a batch ends only where it is full
        tokens = sum(lengths[i] for i in one) + lengths[two[0]]
        assert len(one) == max_rows or (max_tokens is not None and tokens > max_tokens)


def test_token_batches_by_hand():
    assert token_batches([5, 1, 9, 2, 3], 2) == [[1, 3], [4, 0], [2]]
    assert token_batches([5, 1, 9, 2, 3], 9, 6) == [[1, 3, 4], [0], [2]]
    assert token_batches([5, 1, 9, 2, 3], 9, 8) == [[1, 3, 4], [0], [2]], "a row over the limit is alone"
    assert token_batches([], 4, 8) == []


@pytest.mark.parametrize("junk", [1, 17, 63])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_junk_in_a_groups_padding_changes_nothing(scalars, name, junk):
    """Within the padding that a group may have, below a prefix and without one; with the limit as it is."""
    scalar = scalars(name, None)
    prompts = rows((0, 60))
    answers = [rows((40, 39, 38, 40, 3)), rows((60, 60, 59, 58))]  # 297 tokens after the second: more than a block
    last = torch.tensor([len(answer) for own in answers for answer in own]) - 1
    clean, dirty = (pack_continuations(prompts, answers, pad) for pad in (0, junk))
    assert int((clean.input_ids != dirty.input_ids).sum()) == 6, "the rows are as long as they are for their padding"
    assert torch.equal(clean.starts, dirty.starts) and clean.parts == dirty.parts
    weights = coefficients(len(last))
    one, two = (scalar(pack, pack.starts + last) for pack in (clean, dirty))
    assert torch.equal(one, two)
    grads = [gradient((scores * weights).sum(), scalar) for scores in (one, two)]
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    assert max(float(g.abs().max()) for g in grads[0].values()) > 1e-2
    with torch.no_grad():
        assert torch.equal(scalar(clean, clean.starts + last), scalar(dirty, dirty.starts + last))


def test_a_pack_moves_with_its_tensors():
    pack = pack_continuations([(1, 2), ()], [[(3,), (4, 5)], [(6,)]])
    there = pack.to(torch.device("meta"), non_blocking=True)
    block, group = there.parts
    tensors = (there.input_ids, there.position_ids, there.starts, block.unseen)
    assert {x.device.type for x in tensors} == {"meta"}
    assert there.rows == pack.rows and group == pack.parts[1] and pack.parts[0].unseen.device == CPU


# Half precision and activation checkpointing


@pytest.fixture
def half_case():
    """A policy, its rows, and the gradient of a sum of log-probabilities."""
    policy = Policy(build(PACKABLE["llama"]).eval())
    texts = [row for row in rows() if len(row) > 1]
    lengths = torch.ones(len(texts), dtype=torch.long), torch.tensor([len(row) - 1 for row in texts])
    weights = torch.rand(len(texts), 39, generator=torch.Generator().manual_seed(1))

    def read(policy=policy):
        logprobs = response_logprobs(policy, padded(texts), *lengths, 1.0)[0]
        return logprobs, gradient((logprobs * weights).sum() / 100, policy)

    return SimpleNamespace(
        policy=policy, read=read, mask=weights.new_ones(weights.shape).cumsum(1) <= lengths[1][:, None]
    )


def cosine(a: dict, b: dict) -> float:
    a, b = (torch.cat([g.double().flatten() for g in grads.values()]) for grads in (a, b))
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_is_near_full_precision_and_gradients_are_float32(half_case, checkpointing):
    policy, read, mask = half_case.policy, half_case.read, half_case.mask
    full, full_grads = read()
    if checkpointing:
        policy.inner.gradient_checkpointing_enable()
        policy.train()
        assert policy.inner.is_activation_checkpointing
    with torch.autocast("cpu", torch.bfloat16):
        half, half_grads = read()
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert float((half - full)[mask].abs().mean()) < 0.05 and float(full[mask].abs().mean()) > 3
    assert all(g.dtype == torch.float32 for g in half_grads.values())
    assert cosine(half_grads, full_grads) > 0.99
    for name, grad in half_grads.items():
        assert cosine({0: grad}, {0: full_grads[name]}) > 0.98, name
        assert float(grad.norm()) == pytest.approx(float(full_grads[name].norm()), rel=0.05), name


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_activation_checkpointing_changes_no_gradient(half_case, packed):
    policy = half_case.policy if packed else Policy(build(PACKABLE["llama"]), packed=False)
    plain, plain_grads = half_case.read(policy)
    calls = []
    for layer in policy.inner.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    policy.inner.gradient_checkpointing_enable()
    policy.train()
    again, grads = half_case.read(policy)
    assert len(calls) == 4, "each of two layers forward, and once more in the backward pass"
    assert torch.equal(plain, again)
    same_gradient(grads, plain_grads, 1e-6)


def test_half_precision_scores(scalars):
    scalar = scalars("llama", None)
    pack, weights = pack_continuations(rows((6,)), [rows((9, 8, 3, 2))]), coefficients(4)
    last = pack.starts + torch.tensor([9, 8, 3, 2]) - 1
    full = scalar(pack, last)
    full_grads = gradient((full * weights).sum(), scalar)
    with torch.autocast("cpu", torch.bfloat16):
        half = scalar(pack, last)
        half_grads = gradient((half * weights).sum(), scalar)
    assert half.dtype == torch.float32
    assert float((half - full).abs().mean()) < 0.05 * float(full.detach().std())
    assert all(g.dtype == torch.float32 for g in half_grads.values()) and cosine(half_grads, full_grads) > 0.99


@pytest.mark.parametrize("half", [False, True])
def test_lora_gradients_of_a_pack_are_those_of_single_rows(scalars, half):
    """Only adapters and the head are trained; the base's casts carry no gradient."""
    scalar = scalars("llama", None)
    scalar.model = with_lora(scalar.model, LORA)
    with torch.no_grad():
        for name, parameter in scalar.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trained = {name: p for name, p in scalar.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) and any("score" in name for name in trained)
    pack, weights = pack_rows(rows()), coefficients(len(LENGTHS))
    theirs = torch.autograd.grad((naive_scores(scalar, rows()) * weights).sum(), list(trained.values()))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = (scalar(pack, pack.starts + torch.tensor(LENGTHS) - 1) * weights).sum()
    ours = torch.autograd.grad(loss, list(trained.values()))
    if half:
        assert all(g.dtype == torch.float32 for g in ours)
        assert cosine(dict(enumerate(ours)), dict(enumerate(theirs))) > 0.99
    else:
        same_gradient(dict(zip(trained, ours, strict=True)), dict(zip(trained, theirs, strict=True)))


def test_held_casts_are_used_again_and_given_up(half_case):
    """Within `hold` a weight is cast once; after it, changed weights are seen."""
    policy = half_case.policy
    texts = rows((5, 6))
    lengths = torch.tensor([1, 1]), torch.tensor([4, 5])

    def read() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return response_logprobs(policy, padded(texts), *lengths, 1.0)[0]

    with torch.no_grad():
        expected = read()
    with policy.cached_casts():
        first = read()
        kept = dict(policy.casts)
        second = read()
        assert not first.requires_grad and all(policy.casts[key] is value for key, value in kept.items())
        assert len(kept) >= len(list(policy.parameters()))
    assert policy.casts is None and torch.equal(first, expected) and torch.equal(second, expected)
    with torch.no_grad():
        policy.inner.get_output_embeddings().weight.zero_()
    assert float((read()[0, :4] + 4.158883).abs().max()) < 1e-5  # - ln 64
    assert read().requires_grad


def test_what_cannot_be_packed_is_said_once_and_never_probed_again(capsys, monkeypatch):
    packing.say_padded.cache_clear()
    assert not set_packed(build(REFUSED["a window"])) and not set_packed(build(REFUSED["a window"]))
    assert capsys.readouterr().out.count("MistralForCausalLM cannot read packs here") == 1
    assert set_packed(build(PACKABLE["llama"]))
    monkeypatch.setattr(packing, "reads_packs", lambda backbone: pytest.fail("the probe copies all weights"))
    assert set_packed(build(PACKABLE["llama"]))
