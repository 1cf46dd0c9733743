"""The report of a reward model, beside baselines, a peer and its labelers: tables, and the worst mistakes as text.

`stages/evaluate_rm.py` writes it. report.json holds what `ranking_accuracy` gives, and labelers, transfer, peer,
score_spread, folds, held_out_labelers, each null where the data do not have it. No text of the rankings is in it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import UserError
from align.evaluate.report import Table
from align.evaluate.reward_report import (
    Scored,
    groups_of,
    pooled_accuracy,
    prompts_of,
    ranking_accuracy,
    right,
    untied_pairs,
)
from align.evaluate.win_rate import Interval, accuracy_gain, text_key
from align.rows import read_rows
from align.types import Ranking, contents

GROUPS = {
    "by_k": "Completions ranked (K)",
    "by_rank_distance": "Difference in rank",
    "by_length": "Length of the better completion, as a multiple of the worse",
    "by_source": "Source",
    "by_language": "Language",
    "by_labeler": "Labeler",
}
PEER_GROUPS = ("by_k", "by_source", "by_language")
WARNING = "Real data: the texts below may be offensive. Keep this file out of logs and documents."


def transfer(scored: Sequence[Scored], trained: Sequence[Ranking], seed: int) -> dict[str, Any] | None:
    """Accuracy on sources that the training rankings have and on those they have not. Null when they name none."""
    known = {str(ranking.columns["source"]) for ranking in trained if ranking.columns.get("source")}
    if not known:
        return None
    groups: dict[str, list[Scored]] = {"trained": [], "held_out": []}
    for ranking, scores in scored:
        source = ranking.columns.get("source")
        if source:
            groups["trained" if str(source) in known else "held_out"].append((ranking, scores))
    return {
        name: found and found | {"sources": sorted({str(ranking.columns["source"]) for ranking, _ in groups[name]})}
        for name, found in ((name, pooled_accuracy(rows, seed)) for name, rows in groups.items())
    }


def compare(name: str, scored: Sequence[Scored], peer: Sequence[Sequence[float] | None], seed: int) -> dict[str, Any]:
    """A peer on the same rankings, those that both have scored: what `ranking_accuracy` gives of it, and differences.

    difference: our accuracy minus the peer's on the same pairs, with the interval of the paired difference; also by K,
    source and language, and for all K > 2 together.
    """
    both = [(ranking, ours, theirs) for (ranking, ours), theirs in zip(scored, peer, strict=True) if theirs is not None]
    if not both:
        raise UserError(f"peer: {name} has scored none of the rankings; give scores of the same file")
    ours, theirs = [(r, mine) for r, mine, _ in both], [(r, list(other)) for r, _, other in both]
    pairs = untied_pairs(ours)
    correct, other, prompts = right(pairs), right(untied_pairs(theirs)), prompts_of(pairs)
    found = ranking_accuracy(theirs, seed)
    sizes = np.array([len(p.ranking.completions) for p in pairs])

    def gain(rows: np.ndarray) -> Interval:
        return accuracy_gain(correct[rows], other[rows], prompts[rows], seed)

    groups = groups_of(pairs)
    return {
        "name": name,
        "rankings": len(both),
        **{k: v for k, v in found.items() if k not in ("baselines", "gain", "by_column")},
        "difference": gain(sizes > 0),
        "difference_over_2": gain(sizes > 2) if (sizes > 2).any() else None,
        **{
            f"difference_{group}": {label: gain(np.array(groups[group]) == label) for label in found[group]}
            for group in PEER_GROUPS
        },
    }


def scores_row(ranking: Ranking, scores: Sequence[float] | None) -> dict[str, Any]:
    """A line of scores.jsonl, which another report reads as its peer's. No text, but a mark to know the ranking by."""
    return {"ranking": _mark(ranking), "scores": scores}


def read_scores(path: str, rankings: Sequence[Ranking]) -> list[list[float] | None]:
    """`peer_scores_file`: a line for each ranking, in order: {"scores": [K numbers] or null[, "ranking": mark]}.

    Raises UserError, with the line, when it is not of these rankings.
    """
    rows = list(read_rows(path))
    if len(rows) != len(rankings):
        raise UserError(
            f"peer_scores_file: {path}: {len(rows)} lines for {len(rankings)} rankings; score rankings_file"
        )
    found: list[list[float] | None] = []
    for (place, row), ranking in zip(rows, rankings, strict=True):
        if not isinstance(row, Mapping) or "scores" not in row:
            raise UserError(f'{place}: has no scores; write {{"scores": [a number for each completion]}}')
        scores, size = row["scores"], len(ranking.completions)
        if row.get("ranking") not in (None, _mark(ranking)):
            raise UserError(f"{place}: scores another ranking than rankings_file has there; give both one file")
        numbers = isinstance(scores, list) and all(isinstance(s, (int, float)) and np.isfinite(s) for s in scores)
        if scores is not None and (not numbers or len(scores) != size):
            raise UserError(f"{place}: {size} completions need as many numbers as scores (or null for none)")
        found.append(scores)
    return found


def _mark(ranking: Ranking) -> str:
    parts = [text_key(ranking.prompt), *map(text_key, ranking.completions)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def worst_mistakes(scored: Sequence[Scored], count: int) -> str:
    """The pairs with the largest gap the wrong way, at most one a prompt, as Markdown with their texts."""
    wrong = sorted((p for p in untied_pairs(scored) if p.gap < 0), key=lambda p: p.gap)
    first = {text_key(p.ranking.prompt): p for p in reversed(wrong)}
    worst = sorted(first.values(), key=lambda p: p.gap)[:count]
    scores_of = {id(ranking): scores for ranking, scores in scored}
    parts = ["# The worst mistakes", WARNING]
    for i, pair in enumerate(worst, start=1):
        ranking, scores = pair.ranking, scores_of[id(pair.ranking)]
        where = [f"gap {pair.gap:+.3f}", f"difference in rank {pair.distance:g}"]
        where += [f"labeler {ranking.labeler}"] if ranking.labeler else []
        where += [f"source {ranking.columns['source']}"] if ranking.columns.get("source") else []
        parts += [f"## {i}. " + ", ".join(where), "Prompt:", _quoted(contents(ranking.prompt))]
        for what, k in (("better", pair.win), ("worse", pair.lose)):
            parts += [f"Labeler: {what}. Score {scores[k]:+.3f}:", _quoted(contents(ranking.completions[k]))]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report's tables, from report.json's content."""
    peer = report["peer"]
    found = [_overview(report)]
    for name, title in GROUPS.items():
        rows = [_group_row(label, cell, peer, name) for label, cell in report[name].items()]
        if len(rows) > 1 or name == "by_k":
            header = ["", "accuracy", "pairs", "prompts"] + (["minus peer"] if peer and name in PEER_GROUPS else [])
            found.append(Table(f"Accuracy: {title}", "Pairs that the labeler did not tie.", header, rows))
    unseen = report["held_out_labelers"]
    people = [_people(report["labelers"], "Labelers")]
    people += [_people(unseen["labelers"], "Labelers unseen in training")] if unseen else []
    return found + [table for table in (*people, _folds(report), _spread(report)) if table]


def _group_row(label: str, cell: Mapping[str, Any], peer: Mapping[str, Any] | None, name: str) -> list[str]:
    row = [label, _show(cell["accuracy"]), str(cell["pairs"]), str(cell["prompts"])]
    return row + ([_show(peer[f"difference_{name}"].get(label))] if peer and name in PEER_GROUPS else [])


def _overview(report: Mapping[str, Any]) -> Table:
    bases, gain, peer = report["baselines"], report["gain"], report["peer"]
    rows = [
        ["this model", _show(report["accuracy"]), ""],
        ["the longer is better", _show(bases["length_only"]), _show(gain["length_only"])],
        ["length, fitted on other prompts", _show(bases["length_fitted"]), _show(gain["length_fitted"])],
        ["random scores (range of 95% of such scorers)", _show(bases["random"]), ""],
    ]
    if report["held_out_labelers"]:
        rows.append(["this model, labelers unseen in training", _show(report["held_out_labelers"]["accuracy"]), ""])
    for name, part in (report["transfer"] or {}).items():
        if part:
            rows.append([f"this model, {name.replace('_', ' ')} sources", _show(part["accuracy"]), ""])
    if peer:
        rows.append([f"peer: {peer['name']}", _show(peer["accuracy"]), _show(peer["difference"])])
    if report["labelers"]["ceiling"]:
        rows.append(["this model, pairs that two labelers judged", _show(report["labelers"]["accuracy"]), ""])
        rows.append(["ceiling there: perfect predictor of the mean labeler", _show(report["labelers"]["ceiling"]), ""])
    note = (
        f"{report['pairs']} untied pairs of {report['prompts']} prompts; {report['ties']} tied pairs are left out. "
        "Brackets: 95% intervals, clustered by prompt; differences are paired. "
        f"Expected calibration error {report['calibration_error']:.3f}, log loss {report['log_loss']:.3f} nats "
        "(0.693 knows nothing)."
    )
    return Table("Accuracy", note, ["scorer", "accuracy", "this model minus it"], rows)


def _people(people: Mapping[str, Any], title: str) -> Table | None:
    if people["agreement"] is None:
        return None
    low, high = people["ceiling_bounds"]
    rows = [
        ["two labelers order a pair alike", _show(people["agreement"])],
        ["the same verdict, ties included", _show(people["agreement_with_ties"])],
        ["judgements that are ties", f"{people['ties']:.1%}"],
        ["ceiling, gaps in quality normal", _show(people["ceiling"])],
        ["ceiling, whatever the gaps", f"{low:.2f} to {high:.2f}"],
    ]
    rows.append(["this model on those pairs", _show(people["accuracy"])])
    if people["consensus"]:
        rows.append(["this model against the labelers' joint order there", _show(people["consensus"]["accuracy"])])
    rows += [[f"labeler {name} with the others", _show(row["agreement"])] for name, row in people["by_labeler"].items()]
    note = f"{people['pairs']} pairs of judgements on {people['prompts']} prompts, neither a tie unless stated."
    return Table(title, note, ["measure", "value"], rows)


def _folds(report: Mapping[str, Any]) -> Table | None:
    rows = []
    for by, folds in report["folds"].items():
        if folds:
            named = [(f"without {', '.join(fold['groups'])}", fold) for fold in folds["folds"]]
            rows += [[name, *_in_and_out(fold), ""] for name, fold in named]
            rows.append([f"all folds by {by}", *_in_and_out(folds), _show(folds["drop"])])
    note = "Each row is a model that never saw a group; the pairs are of prompts it did not learn from."
    header = ["left out", "groups it learned from", "the group left out", "drop"]
    return Table("Cross-validation", note, header, rows) if rows else None


def _in_and_out(fold: Mapping[str, Any]) -> list[str]:
    return [_show(fold[name] and fold[name]["accuracy"]) for name in ("in_group", "held_out")]


def _spread(report: Mapping[str, Any]) -> Table | None:
    spread = report["score_spread"]
    if not spread:
        return None
    rows = [[way, f"{gap:.2e}", str(spread["flipped_pairs"][way])] for way, gap in spread["ways"].items()]
    note = (
        f"{spread['rows']} completions, each against its score when alone in a forward pass; "
        f"their scores' standard deviation is {spread['score_std']:.3f}."
    )
    return Table("Score under batching and padding", note, ["computed", "largest difference", "pairs flipped"], rows)


def _show(interval: Mapping[str, float] | Interval | None) -> str:
    if interval is None:
        return "-"
    return str(interval if isinstance(interval, Interval) else Interval(**interval))


def write_markdown(folder: Path, report: Mapping[str, Any], plots: Mapping[str, Path]) -> None:
    """folder/report.md; `plots` are caption -> file in the folder."""
    parts = [
        f"# Reward model {report['model']}",
        *(table.markdown() for table in tables(report)),
        *(f"![{caption}]({path.name})" for caption, path in plots.items()),
        "The worst mistakes, with their texts, are in `mistakes.md`. " + WARNING.replace("below", "there"),
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
