"""Starting weights for the embedded base model: heads that copy and that recognise from the first step.

Copying a word from the prompt is what most instructions need, and noticing that a word was in the prompt is what
judging an answer needs. A small model learns both last: from random weights neither formed within the minutes that a
CPU demo has (docs/LOG.md). So three heads start as what trained models end up with: one looks a token back and one
finds where the current token stood before and copies what followed (induction, Olsson et al. 2022); one tells whether
the current token stood before at all (duplicate tokens, Wang et al. 2022), resting on the first token where it did not
(attention sink, Xiao et al. 2023). Starting attention from structure found in trained models is Trockman & Kolter's
mimetic initialisation (2023). Everything stays trainable, and nothing about the world is in it. Sublayers that write to
the residual stream start small, so that embeddings can be read through it.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

WRITE_STD = 0.01  # of what each sublayer adds to the residual stream, next to embeddings of std 1 / sqrt(d)
LOOK_BACK = 4.5  # of the constant query and key; their product peaks one token back
MATCH = 3.0  # of the query and key that compare tokens
NOTE, COPY = 0.1, 0.2  # how loudly the previous token is noted, and a found token copied
# Of the head that recognises.
SAME, NEAR = 4.5, 5.0  # of query and key alike: what makes equal tokens find each other, and neighbours not
REST = 24.0  # any token's product with BOS, after scaling


@torch.no_grad()
def start_with_circuits(model: LlamaForCausalLM) -> None:
    """Set heads 0 and 1 of the first layer and head 0 of the second in place.

    Needs attention biases, two layers, two heads and a BOS token at the start of every row.
    """
    start_with_induction(model)
    start_with_recognition(model)


def start_with_induction(model: LlamaForCausalLM) -> None:
    """A token copies what followed it the last time."""
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


def start_with_recognition(model: LlamaForCausalLM) -> None:
    """A token attends to where it stood before, and to BOS where it did not; what it reads of BOS says "new"."""
    attention, width = model.model.layers[0].self_attn, model.config.hidden_size
    head = width // model.config.num_attention_heads
    rows = slice(head, 2 * head)
    pair = torch.arange(head) % (head // 2)  # rotary pairs, fast to slow
    first = torch.arange(head) < head // 2  # one component of each pair
    compared = ((pair >= head // 4) & (pair < head // 2 - 1))[:, None]  # (head, 1): these barely turn
    rest = head // 2 - 1  # the slowest
    token = orthogonal(width)[:head]  # (head, width)
    bos = torch.nn.functional.normalize(model.model.embed_tokens.weight[model.config.bos_token_id], dim=0)
    loud = width**0.5  # the length of a normalised embedding

    attention.q_proj.weight[rows] = SAME * token * compared
    attention.k_proj.weight[rows] = SAME * token * compared
    # The fast pairs' product is lowest at distance 0, so that a token does not find itself.
    fast = NEAR * ((pair < head // 4) & first)
    pull = (REST * head**0.5 / loud) ** 0.5
    attention.q_proj.bias[rows] = fast + pull * (torch.arange(head) == rest)
    attention.k_proj.bias[rows] = -fast
    attention.k_proj.weight[head + rest] = pull * bos
    # One value, 5 at BOS and about 0 elsewhere, written in a direction of its own.
    attention.v_proj.weight[rows] *= 0.3
    attention.v_proj.weight[head] = 5.0 / loud * bos
    attention.o_proj.weight[:, head] = COPY * orthogonal(width)[0]


def orthogonal(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width))[0]


def embedding_std(width: int) -> float:
    """Unit-length rows: a logit is then the cosine with the final state, times sqrt(width)."""
    return 1.0 / math.sqrt(width)
