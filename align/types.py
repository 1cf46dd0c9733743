"""The records that cross module borders. Frozen; shapes in the field comments.

Legend: B episodes, Q query tokens, R response tokens (padded to the longest), T = query + response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Message = Mapping[str, str]  # {"role": "user" | "assistant" | "system", "content": str}
Text = str | tuple[Message, ...]  # plain text, or a conversation


def contents(text: Text) -> str:
    """The text alone, as reward models and judges read it; of a conversation, its messages' contents, an empty line
    between two."""
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer a labeler wrote for it (paper section 3.4)."""

    prompt: Text
    completion: Text
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranking:
    """K >= 2 completions of one prompt with their ranks: lower is better, equal is a tie."""

    prompt: Text
    completions: tuple[Text, ...]  # K
    ranks: tuple[float, ...]  # K
    labeler: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt for a policy, with whatever other columns its file has (reward functions and judges read them)."""

    prompt: Text
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """K >= 2 continuations to be weighed by their probabilities: answers to a question, or two sentences."""

    prompt: Text | None  # None: the choices are whole texts
    choices: tuple[str, ...]  # K
    right: tuple[int, ...] = ()  # none: a pair of which neither is right
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Episode:
    """One query and its sampled response, as tokens. `response` ends in EOS exactly when `finished`."""

    query: tuple[int, ...]
    response: tuple[int, ...]
    finished: bool
    logprobs: tuple[float, ...] | None = None  # of the response, as the sampler's engine computed them


@dataclass(frozen=True)
class Rollout:
    """The episodes of one iteration and everything computed from them. Rows are episodes, in global order."""

    input_ids: Tensor  # (B, T) query then response, padded on the right
    query_lengths: Tensor  # (B,)
    response_lengths: Tensor  # (B,) counts EOS
    finished: Tensor  # (B,) bool: the response ends in EOS
    response_mask: Tensor  # (B, R) True on response tokens, EOS included
    logprobs: Tensor  # (B, R) of the policy that sampled, at the rollout temperature
    ref_logprobs: Tensor  # (B, R)
    values: Tensor  # (B, R) value of the state before each response token
    scores: Tensor  # (B,) from the reward, after the missing-EOS rule
    raw_scores: Tensor  # (B,) before it
    rewards: Tensor  # (B, R) per token: KL penalty, plus the score on the last token
    advantages: Tensor  # (B, R) whitened where whiten_advantages says so
    returns: Tensor  # (B, R)
    sampler_logprobs: Tensor | None = None  # (B, R) as the sampler's engine computed them; None where it gives none
    importance_weights: Tensor | None = None  # (B, R) of the policy loss; None: all 1
    part_scores: Mapping[str, Tensor] = field(default_factory=dict)  # (B,) each: the reward's parts, for the log

    def index(self, rows: Tensor) -> "Rollout":
        """The same rollout with only `rows`, cut to their longest query + response."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "part_scores"}
        cut = {name: value[rows] for name, value in given.items() if value is not None}
        width = int((cut["query_lengths"] + cut["response_lengths"]).max())
        longest = int(cut["response_lengths"].max())
        cut["input_ids"] = cut["input_ids"][:, :width]
        for name, value in cut.items():
            if name != "input_ids" and value.dim() == 2:
                cut[name] = value[:, :longest]
        return Rollout(**cut, part_scores={name: scores[rows] for name, scores in self.part_scores.items()})

    def tensors(self) -> dict[str, Tensor | None]:
        """All fields by name, the parts of the reward under theirs."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "part_scores"} | dict(self.part_scores)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class UpdateStats:
    """Sums over the response tokens (or steps) of one PPO update; `docs/metrics.md` names what they become."""

    sums: Mapping[str, float]

    def mean(self, name: str, count: str = "tokens") -> float:
        return self.sums[name] / max(self.sums[count], 1.0)

    @staticmethod
    def total(parts: list["UpdateStats"]) -> "UpdateStats":
        names = {name for part in parts for name in part.sums}
        maxima = {n for n in names if n.startswith("max_")}
        sums = {n: sum(p.sums.get(n, 0.0) for p in parts) for n in names - maxima}
        sums |= {n: max(p.sums.get(n, float("-inf")) for p in parts) for n in maxima}
        return UpdateStats(sums)


def pad_rows(rows: list[list[int]] | list[list[float]], value: float, dtype: torch.dtype = torch.long) -> Tensor:
    """Ragged rows to a right-padded (B, longest) tensor."""
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=value)
