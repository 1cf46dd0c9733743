"""align/initialise.py: what the embedded base model's heads attend to before any training."""

import pytest
import torch

from align.config import BaseConfig
from align.text import Codec
from stages.base import build_model, train_tokenizer

WORDS, REPEATED_AT = 14, 12
ROWS = 200


@pytest.fixture(scope="module")
def attentions() -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Per layer (N, heads, T, T) on rows of BOS and random tokens, one of which stood before, at the places (N,)."""
    codec = Codec(train_tokenizer(["a cow , a dog and a bird ."], 300))
    torch.manual_seed(0)
    model = build_model(BaseConfig("out", attn_implementation="eager"), codec).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([3 + torch.randperm(200, generator=generator)[:WORDS] for _ in range(ROWS)])
    places = torch.randint(1, REPEATED_AT - 3, (ROWS,), generator=generator)  # 4 to 12 tokens before its return
    ids[torch.arange(ROWS), REPEATED_AT] = ids[torch.arange(ROWS), places]
    rows = torch.cat([torch.full((ROWS, 1), codec.tokenizer.bos_token_id), ids], 1)
    with torch.no_grad():
        return model(rows, output_attentions=True).attentions, places + 1


def test_a_head_looks_one_token_back(attentions):
    weights, _ = attentions
    before = weights[0][:, 0].diagonal(offset=-1, dim1=1, dim2=2)  # (N, T - 1)
    assert before.mean() > 0.5


def test_a_head_finds_what_followed_the_current_token_the_last_time(attentions):
    weights, places = attentions
    following = weights[1][torch.arange(ROWS), 0, REPEATED_AT + 1, places + 1]
    assert following.mean() > 3 / (REPEATED_AT + 2)  # three times its even share


def test_a_head_finds_the_token_itself_or_rests_on_bos(attentions):
    weights, places = attentions
    head = weights[0][:, 1]  # (N, T, T)
    found = head[torch.arange(ROWS), REPEATED_AT + 1, places]
    resting = head[:, 1:REPEATED_AT, 0]
    returned, new = head[:, REPEATED_AT + 1, 0].mean(), resting.mean()
    assert found.mean() > 0.5 and new > 0.5
    assert new - returned > 0.3  # what it reads of BOS tells a new token from one that stood before
