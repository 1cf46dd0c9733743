"""From logits to log-probabilities and entropies of tokens, always in float32 and at the sampling temperature."""

from collections.abc import Iterator

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


class LinearLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies behind a linear head, a chunk of positions at a time.

    One chunk's float32 logits exist at a time, in a buffer small enough for the cache, and are computed again in the
    backward pass: a fourth matrix product instead of M x V numbers kept. The entropy carries no gradient, and is None
    where it is not asked for: it costs as much as the rest but the product.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, temperature, chunk, with_entropies):
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalisers, entropies, terms = torch.empty_like(logprobs), None, None
        if with_entropies:
            entropies = torch.empty_like(logprobs)
            ctx.mark_non_differentiable(entropies)
            terms = torch.empty(min(chunk, len(hidden)), weight.shape[0], dtype=torch.float32, device=hidden.device)
        for rows, logits in chunk_logits(hidden, weight, bias, temperature, chunk):
            normaliser = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, tokens[rows, None]).squeeze(1) - normaliser
            normalisers[rows] = normaliser
            if with_entropies:
                logits -= normaliser[:, None]
                entropies[rows] = -torch.exp(logits, out=terms[: len(logits)]).mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, tokens, normalisers)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, tokens, normalisers = ctx.saved_tensors
        grad = grad / ctx.temperature
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        # Chunks are gathered in the weights' type before they are multiplied: few, large products into grad_weight.
        gathered = min(GATHERED_CHUNKS, max(1, GATHERED_ELEMENTS // (ctx.chunk * weight.shape[0])))
        for span in spans(len(hidden), gathered * ctx.chunk):
            grad_logits = torch.empty(span.stop - span.start, weight.shape[0], dtype=weight.dtype, device=weight.device)
            for rows, logits in chunk_logits(hidden[span], weight, bias, ctx.temperature, ctx.chunk):
                here, chosen = grad[span][rows, None], tokens[span][rows, None]
                logits.sub_(normalisers[span][rows, None]).exp_().mul_(-here)  # d logprob / d logits = onehot - softmax
                logits.scatter_add_(1, chosen, here)
                grad_bias = None if bias is None else grad_bias.add_(logits.sum(0))
                grad_logits[rows] = logits
            grad_hidden[span] = grad_logits @ weight
            if ctx.needs_input_grad[1]:
                product = grad_logits.T @ hidden[span]
                grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None if bias is None else grad_bias.to(bias.dtype), None, None, None, None


CHUNK_ELEMENTS = 2**22  # logits in float32 that fit a CPU's cache: 16 MB
GPU_CHUNK_ELEMENTS = 2**25  # a GPU wants large products: 128 MB, twice that forward
GATHERED_CHUNKS, GATHERED_ELEMENTS = 8, 2**25  # at most; in the weights' type, so 64 or 128 MB


def spans(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def chunk_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of positions and their logits / temperature in float32, all in the same buffer. (M, d) -> (C, V) each"""
    buffer = torch.empty(min(chunk, len(hidden)), weight.shape[0], dtype=torch.float32, device=hidden.device)
    for rows in spans(len(hidden), chunk):
        logits = buffer[: rows.stop - rows.start]
        logits.copy_(torch.nn.functional.linear(hidden[rows], weight, bias))
        yield rows, logits if temperature == 1 else logits.div_(temperature)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    chunk_elements: int | None = None,
    with_entropies: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` and `entropy` of the logits `hidden @ weight.T + bias`, which never exist together.

    (M, d), (V, d), (V,) or None, (M,) -> (M,), (M,), float32
    """
    assert hidden.dim() == 2 and tokens.shape == hidden.shape[:1]
    chunk_elements = chunk_elements or (GPU_CHUNK_ELEMENTS if hidden.is_cuda else CHUNK_ELEMENTS)
    chunk = max(1, chunk_elements // weight.shape[0])
    return LinearLogprobs.apply(hidden, weight, bias, tokens, temperature, chunk, with_entropies)


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the CDF at `uniforms` in [0, 1), the mode at temperature 0; and its log-probability
    at that temperature (at 1 for the mode). (N, V), (N,) -> (N,), (N,)

    The draw is a function of the row's logits and its own uniform number, so neither the batch a row sits in nor the
    number of processes changes what is sampled.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, token_logprobs(logits, tokens)
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    probabilities = scaled.softmax(-1)  # (N, V)
    tokens = invert_cdf(probabilities, uniforms)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def invert_cdf(probabilities: Tensor, uniforms: Tensor, block: int = 256) -> Tensor:
    """The first column whose cumulative share of its row exceeds the row's number. (N, V), (N,) -> (N,)

    Sums of blocks of columns find the block, cumulative sums inside it the column: one pass over V instead of many.
    """
    width = probabilities.shape[1]
    blocks = torch.nn.functional.pad(probabilities, (0, -width % block)).unflatten(1, (-1, block))  # (N, V / b, b)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold = uniforms.to(ends.dtype)[:, None] * ends[:, -1:]
    picked = torch.searchsorted(ends, threshold, right=True).clamp(max=ends.shape[1] - 1)  # (N, 1)
    before = torch.where(picked > 0, ends.gather(1, (picked - 1).clamp(min=0)), torch.zeros_like(threshold))
    inside = blocks.gather(1, picked[:, :, None].expand(-1, -1, block)).squeeze(1).double().cumsum(-1)  # (N, b)
    column = torch.searchsorted(before + inside, threshold, right=True).clamp(max=block - 1)
    return (picked * block + column).squeeze(1).clamp(max=width - 1)
