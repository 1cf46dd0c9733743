"""Starting weights for the embedded base model: an induction head from the first step.

Copying a word from the prompt is what most instructions need, and what a small model learns last: from random weights
it did not form within the minutes a CPU demo has (docs/LOG.md). So two heads start with the circuit that trained
models end up with (Olsson et al. 2022): one looks a token back, one finds where the current token stood before and
copies what followed. Starting attention from structure found in trained models is Trockman & Kolter's mimetic
initialisation (2023). Everything stays trainable, and nothing about the world is in it. Sublayers that write to the
residual stream start small, so that embeddings can be read through it.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

WRITE_STD = 0.01  # of what each sublayer adds to the residual stream, next to embeddings of std 1 / sqrt(d)
LOOK_BACK = 4.5  # of the constant query and key; their product peaks one token back
MATCH = 3.0  # of the query and key that compare tokens
NOTE, COPY = 0.1, 0.2  # how loudly the previous token is noted, and a found token copied


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM) -> None:
    """Set the first two layers' head 0 in place. Needs attention biases and at least two layers."""
    layers = [layer.self_attn for layer in model.model.layers]
    width = model.config.hidden_size
    head = width // model.config.num_attention_heads
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.normal_(std=WRITE_STD)
    token = orthogonal(width)[:head]  # (head, width): what is read of a token
    note = orthogonal(width)[:head]  # (head, width): where the previous token is noted

    # Head 0 of layer 0 looks one token back: with constant q and k, rotary positions make q.k a function of distance.
    angles = model.config.rope_parameters["rope_theta"] ** (-torch.arange(head // 2) / (head // 2))
    layers[0].q_proj.weight[:head] *= 0.1
    layers[0].k_proj.weight[:head] *= 0.1
    layers[0].q_proj.bias[:head] = LOOK_BACK * torch.cat([torch.ones(head // 2), torch.zeros(head // 2)])
    layers[0].k_proj.bias[:head] = LOOK_BACK * torch.cat([angles.cos(), angles.sin()])
    layers[0].v_proj.weight[:head] = token
    layers[0].o_proj.weight[:, :head] = NOTE * note.T

    # Head 0 of layer 1 compares the current token with the notes, in the slow rotary pairs, which barely turn.
    slow = (torch.arange(head) % (head // 2) >= head // 4)[:, None]  # (head, 1)
    layers[1].q_proj.weight[:head] = MATCH * token * slow
    layers[1].k_proj.weight[:head] = MATCH * note * slow

    # From layer 1 on, a head writes what it reads: attending to a token votes for it.
    for attention in layers[1:]:
        read = orthogonal(width)
        attention.v_proj.weight.copy_(read)
        attention.o_proj.weight.copy_(COPY * read.T)


def orthogonal(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width))[0]


def embedding_std(width: int) -> float:
    """Unit-length rows: a logit is then the cosine with the final state, times sqrt(width)."""
    return 1.0 / math.sqrt(width)
