"""`align stats FILE...`: what is in data files, ours or in any format that `align convert` reads. Numbers, no text.

A file a block: rows and what was dropped, K, ties, lengths, how often the longest answer is ranked first (the baseline
a reward model must beat), repeated rows and prompts, agreement between labelers with its 95% interval, counts by
source, language and labeler. Then the prompts that files share.
"""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from align.data import parse_row
from align.evaluate.win_rate import agreement
from align.readers.reading import Conversion, read
from align.rows import Problem
from align.splits import prompt_key
from align.types import Demonstration, Ranking, contents

COLUMNS = ("source", "language", "labeler")
SHOWN = 8  # values of a column


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="align stats", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--format", help="default: found from the fields")
    args = parser.parse_args(argv)
    found = [conversion for path in args.files for conversion in read([path], args.format)]
    prompts: dict[str, set[str]] = {}
    for conversion in found:
        records = list(parsed(conversion))
        print("\n".join([conversion.summary(), *(f"  {line}" for line in describe(conversion, records))]))
        if conversion.kind != "text":
            asked = {prompt_key(record.prompt) for record in records if record.prompt is not None}
            prompts[", ".join(conversion.paths)] = asked
    for line in shared(prompts):
        print(line)
    return 0


def parsed(conversion: Conversion) -> Iterator[Any]:
    """The rows as records; they have passed the check before."""
    for row in conversion.rows:
        record = parse_row(conversion.kind, row.places[0], row.row, Counter())
        if not isinstance(record, Problem):
            yield record


def describe(conversion: Conversion, records: Sequence[Any]) -> list[str]:
    lines = []
    rankings = [record for record in records if isinstance(record, Ranking)]
    if conversion.kind == "text":
        lines.append(lengths("text", records))
    elif conversion.kind == "choice":
        sizes = Counter(len(record.choices) for record in records)
        lines.append("choices: " + ", ".join(f"{k} x {sizes[k]}" for k in sorted(sizes)))
        lines.append(lengths("choice", [choice for record in records for choice in record.choices]))
    else:
        keys = Counter(prompt_key(record.prompt) for record in records)
        repeated = sum(count > 1 for count in keys.values())
        lines.append(f"prompts: {len(keys)} distinct, {repeated} in more than one row")
        lines.append(lengths("prompt", [contents(record.prompt) for record in records]))
    if rankings:
        lines += ranking_lines(rankings)
    answers = [contents(r.completion) for r in records if isinstance(r, Demonstration)]
    answers += [contents(completion) for ranking in rankings for completion in ranking.completions]
    if answers:
        lines.append(lengths("completion", answers))
    rows = Counter(json.dumps(row.row, sort_keys=True, default=str, ensure_ascii=False) for row in conversion.rows)
    if len(rows) < len(conversion.rows):
        lines.append(f"repeated rows: {len(conversion.rows) - len(rows)}")
    return lines + columns(row.row for row in conversion.rows)


def lengths(name: str, texts: Sequence[str]) -> str:
    """Median, 90th percentile and longest, in characters."""
    sizes = sorted(len(text) for text in texts)
    if not sizes:
        return f"{name}: none"
    high = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    return f"{name} characters: median {median(sizes):.0f}, 90% {high}, longest {sizes[-1]}"


def ranking_lines(rankings: Sequence[Ranking]) -> list[str]:
    sizes = Counter(len(ranking.completions) for ranking in rankings)
    gaps = [a - b for ranking in rankings for a, b in itertools.combinations(ranking.ranks, 2)]
    ties = sum(gap == 0 for gap in gaps)
    lines = ["K: " + ", ".join(f"{k} x {sizes[k]}" for k in sorted(sizes))]
    lines.append(f"pairs: {len(gaps)}, {ties} of them ties ({ties / len(gaps):.1%})")
    lines.append(f"the longer answer is better in {longer_is_better(rankings):.1%} of the pairs that are no ties")
    agreed = agreement(rankings)
    if agreed is not None:
        where = f"over {agreed.pairs} pairs that two of them ordered, of {agreed.prompts} prompts"
        lines.append(f"agreement between labelers: {agreed.interval} (95%) {where}")
    return lines


def longer_is_better(rankings: Iterable[Ranking]) -> float:
    """The accuracy of a scorer that knows lengths alone; equal lengths count half."""
    right = []
    for ranking in rankings:
        answers = zip(map(len, map(contents, ranking.completions)), ranking.ranks, strict=True)
        for (one, first), (other, second) in itertools.combinations(answers, 2):
            if first != second:
                right.append(0.5 if one == other else float((one > other) == (first < second)))
    return sum(right) / max(len(right), 1)


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Counts by source, language and labeler, the most frequent first."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in COLUMNS}
    for row in rows:
        for name in COLUMNS:
            if row.get(name) is not None:
                counts[name][str(row[name])] += 1
    lines = []
    for name, found in counts.items():
        shown = ", ".join(f"{value} {count}" for value, count in found.most_common(SHOWN))
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        lines += [f"{name}: {shown}{more}"] * bool(found)
    return lines


def shared(prompts: Mapping[str, set[str]]) -> list[str]:
    """A line for each two files that have prompts in common."""
    lines = []
    for first, second in itertools.combinations(prompts, 2):
        common = len(prompts[first] & prompts[second])
        if common:
            lines.append(f"{second}: {common} of its {len(prompts[second])} prompts are also in {first}")
    return lines
