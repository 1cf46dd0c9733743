"""What a policy finds likely, without sampling (paper App. D): multiple choice, and pairs of sentences.

Multiple choice: it picks the choice with the highest log-probability a token, length-normalised, so that short answers
have no advantage. A pair that has no right answer, such as a stereotype and its opposite: the entropy of the two whole
texts' probabilities, in bits. 1: no preference between them; 0: certain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from align.errors import UserError
from align.evaluate.win_rate import Interval, mean_interval, paired_gain, rate_interval
from align.models import Policy
from align.packing import SCORED_TOKENS, pack_continuations, token_batches
from align.reward_functions import NOT_SPACED
from align.runtime import gather_list, my_share
from align.text import Codec
from align.track import announce
from align.types import Choice, Text


@dataclass(frozen=True)
class Weighed:
    """A row's choices as a policy weighs them."""

    logprobs: tuple[float, ...]  # K, of the whole choice, nats
    tokens: tuple[int, ...]  # K

    @property
    def picked(self) -> int:
        return int(np.argmax(np.divide(self.logprobs, self.tokens)))

    @property
    def first(self) -> float:
        """The first's probability where the first or the second must be."""
        return float(expit(self.logprobs[0] - self.logprobs[1]))


def binary_entropy(p: float) -> float:
    """Of a choice between two, in bits: 1 where both are as likely, 0 where one is certain."""
    return 0.0 - sum(q * float(np.log2(q)) for q in (p, 1 - p) if q > 0)


def encode(rows: Sequence[Choice], codec: Codec) -> list[tuple[list[int], list[list[int]]]]:
    """Each row's query and its choices, without EOS. A row without a prompt stands behind `codec.start_id`, so that a
    text's first token counts too. Without a chat template a space parts prompt and choice, where neither has one."""
    queries = iter(codec.prompts([row.prompt for row in rows if row.prompt is not None]))
    plain = codec.tokenizer.chat_template is None
    texts = [apart(row.prompt, choice) if plain else choice for row in rows for choice in row.choices]
    choices = iter(codec.responses(texts))
    return [
        ([codec.start_id] if row.prompt is None else next(queries), [next(choices)[:-1] for _ in row.choices])
        for row in rows
    ]


def apart(prompt: Text | None, choice: str) -> str:
    """The choice as it goes on from a plain prompt."""
    if not isinstance(prompt, str) or prompt[-1:].isspace() or choice[:1].isspace() or NOT_SPACED.match(choice):
        return choice
    return f" {choice}"


@torch.no_grad()
def weigh(policy: Policy, rows: Sequence[Choice], codec: Codec, batch_size: int) -> list[Weighed]:
    """Every row's choices, the prompt computed once for all of them. Each process weighs its share; all have all."""
    encoded = encode([rows[i] for i in my_share(len(rows))], codec)
    weighed: list[Weighed | None] = [None] * len(encoded)
    queries = [len(query) * (1 if policy.packed else len(choices)) for query, choices in encoded]  # padded: repeated
    sizes = [query + sum(map(len, choices)) for query, (_, choices) in zip(queries, encoded, strict=True)]
    # A head that does more than multiply makes its logits whole, a vocabulary for each token.
    limit = SCORED_TOKENS if policy.plain_head else SCORED_TOKENS // 16
    for picked in token_batches(sizes, batch_size, limit):
        queries, choices = zip(*(encoded[i] for i in picked), strict=True)
        totals = iter(continuation_logprobs(policy, queries, choices, codec.pad_id))
        for i in picked:
            own = encoded[i][1]
            weighed[i] = Weighed(tuple(next(totals) for _ in own), tuple(map(len, own)))
    found = gather_list(weighed)
    for number, row in enumerate(found, start=1):
        if not all(map(math.isfinite, row.logprobs)) or not all(row.tokens):
            where = f"choices_file: row {number} of {len(found)} in use"
            raise UserError(f"{where}: a choice has no token or no finite log-probability; mend the row or the model")
    return found


def continuation_logprobs(
    policy: Policy, queries: Sequence[list[int]], rows: Sequence[list[list[int]]], pad_id: int
) -> list[float]:
    """Log-probability of each row of `rows[i]` behind `queries[i]`, in order."""
    # The query's last token, whose state predicts each row's first, is every row's own: padded rows keep no others.
    own = [[[*query[-1:], *row] for row in several] for query, several in zip(queries, rows, strict=True)]
    pack = pack_continuations([query[:-1] for query in queries], own, pad_id).to(policy.device)
    at = torch.cat([torch.arange(row.start, row.start + row.length - 1) for row in pack.rows]).to(policy.device)  # (M,)
    logprobs = policy(pack, at, pack.input_ids[at + 1], 1.0)[0].double().cpu()
    return [float(part.sum()) for part in logprobs.split([row.length - 1 for row in pack.rows])]


def choices_report(rows: Sequence[Choice], weighed: Mapping[str, Sequence[Weighed]], sft: str = "sft") -> dict:
    """{source: {policy: numbers}} with 95% intervals; gains are over `sft` on the same rows. Rows with and without a
    right answer are apart. Raises UserError where no group has the two rows that an interval needs."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, row in enumerate(rows):
        source = " ".join(str(row.columns.get("source") or "choices").split())
        groups.setdefault((source, bool(row.right)), []).append(i)
    report: dict[str, Any] = {}
    for (source, answered), members in groups.items():
        name = source if answered else f"{source} (pairs)"
        if len(members) < 2:
            announce(f"{name}: one row has no interval, left out")
            continue
        own = [rows[i] for i in members]
        numbers = {policy: [found[i] for i in members] for policy, found in weighed.items()}
        report[name] = (accuracies if answered else entropies)(own, numbers, sft)
    if not report:
        raise UserError("choices_file: no source has two rows of a kind, which an interval needs")
    return report


def accuracies(rows: Sequence[Choice], weighed: Mapping[str, Sequence[Weighed]], sft: str) -> dict[str, Any]:
    right = {
        policy: [float(w.picked in row.right) for w, row in zip(found, rows, strict=True)]
        for policy, found in weighed.items()
    }
    chance = float(np.mean([len(row.right) / len(row.choices) for row in rows]))
    policies = {
        policy: {
            "accuracy": rate_interval(int(sum(hits)), len(hits)),
            "gain_vs_sft": paired_gain(hits, right[sft]),
        }
        for policy, hits in right.items()
    }
    return {"rows": len(rows), "chance": chance, "policies": policies}


def entropies(rows: Sequence[Choice], weighed: Mapping[str, Sequence[Weighed]], sft: str) -> dict[str, Any]:
    bits = {policy: [binary_entropy(w.first) for w in found] for policy, found in weighed.items()}
    policies = {
        policy: {
            "entropy": mean_interval(bits[policy]),
            "gain_vs_sft": paired_gain(bits[policy], bits[sft]),
            "prefers_first": rate_interval(sum(w.first > 0.5 for w in found), len(found)),
        }
        for policy, found in weighed.items()
    }
    return {"rows": len(rows), "policies": policies}


def write_markdown(path: Path, report: Mapping[str, Any]) -> None:
    lines = ["# Multiple choice and pairs", ""]
    for name, group in report.items():
        kind = "accuracy" if "chance" in group else "entropy"
        about = f"chance {group['chance']:.2f}" if kind == "accuracy" else "bits; 1 is no preference"
        heads = ["policy", kind, "gain over SFT"] + ["prefers the first"] * (kind == "entropy")
        lines += [f"## {name}: {group['rows']} rows, {about}", "", row_of(heads), row_of(["---"] * len(heads))]
        for policy, numbers in group["policies"].items():
            cells = [numbers[name] for name in (kind, "gain_vs_sft", "prefers_first") if name in numbers]
            lines.append(row_of([policy, *map(shown, cells)]))
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
