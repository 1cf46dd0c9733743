"""Cross-validation of reward models: leave a group of labelers (paper section 4.1) or a source out, test on it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.errors import UserError
from align.evaluate.reward_report import Scored, pooled_accuracy
from align.evaluate.win_rate import mean_interval
from align.manifest import read_manifest
from align.splits import prompt_key
from align.types import Ranking


@dataclass(frozen=True)
class Fold:
    """What one model learns from and is tested on; no test prompt is among those it learned from."""

    groups: tuple[str, ...]  # the labelers or sources left out
    train: list[Ranking]
    in_group: list[Ranking]  # validation rankings by groups that it did learn from
    held_out: list[Ranking]  # rankings by `groups`


def refuse_model(output_dir: str) -> None:
    """Raises UserError when folds would replace a finished reward model."""
    manifest = read_manifest(output_dir)
    if manifest is not None and manifest.stage == "rm":
        raise UserError(f"output_dir: {output_dir} holds a reward model; give folds_by a folder of its own")


def make_folds(train: list[Ranking], validation: list[Ranking], by: str, num_folds: int) -> list[Fold]:
    """Groups of similar volume, each left out once; with fewer labelers (or sources) than folds, one each.

    `by`: "labeler" or "source" (a column). Rows without one are learned from in every fold. A left-out group is tested
    on all its rankings whose prompts nobody in training ranked. Raises UserError when there are no two groups.
    """
    volume = Counter(name for row in train if (name := group_of(row, by)) is not None)
    if len(volume) < 2:
        raise UserError(f"folds_by: train_file names {len(volume)} {by}s; two or more are needed to leave one out")
    parts: list[list[str]] = [[] for _ in range(min(num_folds, len(volume)))]
    for name, _ in sorted(volume.items(), key=lambda item: (-item[1], item[0])):
        min(parts, key=lambda part: sum(volume[member] for member in part)).append(name)
    folds = []
    for names in parts:
        kept = [row for row in train if group_of(row, by) not in names]
        prompts = {prompt_key(row.prompt) for row in kept}
        unseen = [row for row in (*train, *validation) if prompt_key(row.prompt) not in prompts]
        known = {group_of(row, by) for row in kept}
        in_group = [row for row in validation if group_of(row, by) in known and prompt_key(row.prompt) not in prompts]
        held_out = [row for row in unseen if group_of(row, by) in names]
        if not held_out:
            raise UserError(
                f"folds_by: others ranked every prompt of {len(names)} {by}s; give a validation_file of theirs"
            )
        folds.append(Fold(tuple(sorted(names)), kept, in_group, held_out))
    return folds


def group_of(row: Ranking, by: str) -> str | None:
    value = row.labeler if by == "labeler" else row.columns.get(by)
    return None if value is None else str(value)


def summarise_folds(
    folds: Sequence[Fold], scored: Sequence[Mapping[str, Sequence[Scored]]], by: str, seed: int
) -> dict[str, Any]:
    """Accuracy within and outside the groups learned from, of each fold and of all.

    Keys: folds_by, in_group and held_out (all folds' pairs together, clustered by prompt: of these groups; null where
    there are none), others (mean of the folds' held-out accuracies, Student's t: of groups like these), drop (the same
    of in_group - held_out), folds (groups, train, in_group, held_out each).
    """
    rows = [
        {"groups": list(fold.groups), "train": len(fold.train)}
        | {name: pooled_accuracy(results[name], seed) for name in ("in_group", "held_out")}
        for fold, results in zip(folds, scored, strict=True)
    ]
    both = [row for row in rows if row["in_group"] and row["held_out"]]
    drops = [row["in_group"]["accuracy"].mean - row["held_out"]["accuracy"].mean for row in both]
    others = [row["held_out"]["accuracy"].mean for row in rows if row["held_out"]]
    together = {name: [pair for part in scored for pair in part[name]] for name in ("in_group", "held_out")}
    return {
        "folds_by": by,
        **{name: pooled_accuracy(pairs, seed) for name, pairs in together.items()},
        "others": mean_interval(others) if len(others) > 1 else None,
        "drop": mean_interval(drops) if len(drops) > 1 else None,
        "folds": rows,
    }
