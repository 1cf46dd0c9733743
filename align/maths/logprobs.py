"""From logits to log-probabilities and entropies of tokens, always in float32 and at the sampling temperature."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `tokens`. (..., V), (...) -> (...)"""
    assert logits.shape[:-1] == tokens.shape
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens[..., None]).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature). (..., V) -> (...)"""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """One token a row by inverting the CDF at `uniforms` in [0, 1); the mode at temperature 0. (N, V), (N,) -> (N,)

    The draw is a function of the row's logits and its own uniform number, so neither the batch a row sits in nor the
    number of processes changes what is sampled.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).double().cumsum(-1)  # (N, V)
    threshold = uniforms.to(cdf.dtype)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
