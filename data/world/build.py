"""Builds the world's files: held-out prompts first, then all that must not repeat them."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.files import atomic_folder, write_json, write_jsonl
from data.world import labelers, policies, prompts
from data.world.config import WorldConfig
from data.world.judge import judge
from data.world.prompts import Row, stream
from data.world.text import spoken, write_text

Files = dict[str, list[dict[str, Any]]]
FEW_SHOT_FAMILIES = ("story_two", "colour", "list", "opposite_phrase", "greet", "note", "summary", "kind")


def build(config: WorldConfig) -> tuple[Files, dict[str, Any]]:
    """Every file's rows by name, and the data card."""
    seed, taken = config.seed, set()
    files: Files = {}
    for name, number in (
        ("test", config.num_test_prompts),
        ("validation", config.num_validation_prompts),
        ("rm_validation", config.num_rm_prompts_validation),
    ):
        files[f"prompts_{name}"] = prompts.write_prompts(seed, name, number, taken)
    asked = prompts.write_prompts(seed, "demonstrations_validation", config.num_demonstrations_validation, taken)
    files["demonstrations_validation"] = demonstrate(seed, asked)
    held_out = frozenset(taken)

    sizes = (config.num_demonstrations, config.num_rm_prompts, config.num_ppo_prompts)
    pool = prompts.write_prompts(seed, "train", sum(sizes), taken)
    stream(seed, "shuffle").shuffle(pool)
    first, second = sizes[0], sizes[0] + sizes[1]
    files["demonstrations"] = demonstrate(seed, pool[:first])
    files["prompts_rm"], files["prompts_ppo"] = pool[first:second], pool[second:]
    files["few_shot"] = few_shot(pool[:first], config.num_few_shot)

    for name, number in (("text", config.num_documents), ("text_validation", config.num_text_validation)):
        files[name] = [{"text": text} for text in write_text(seed, name, number, held_out)]
    return files, card(config, files)


def demonstrate(seed: int, rows: list[Row]) -> list[Row]:
    """Each prompt answered by one of the labelers."""
    team = labelers.team(seed)
    return [_demonstration(row, team[stream(seed, "who", row["id"]).randrange(len(team))], seed) for row in rows]


def _demonstration(row: Row, labeler: labelers.Labeler, seed: int) -> Row:
    completion = labeler.write(row, stream(seed, "demonstration", row["id"]))
    return {
        "prompt": row["prompt"],
        "completion": spoken(row["language"], completion),
        "labeler": labeler.name,
        **{key: value for key, value in row.items() if key != "prompt"},
    }


def few_shot(rows: list[Row], number: int) -> list[Row]:
    """Clean demonstrations of different families, the last one Chinese."""
    wanted = [(family, "en") for family in FEW_SHOT_FAMILIES[: max(0, number - 1)]] + [("story", "zh")] * (number > 0)
    chosen: list[Row] = []
    for family, language in wanted:
        row = next(
            (
                row
                for row in rows
                if row["task"]["family"] == family and row["language"] == language and row["constraint"] is None
            ),
            None,
        )
        if row is not None:
            chosen.append(
                {
                    "prompt": row["prompt"],
                    "completion": spoken(row["language"], policies.ideal(row)),
                    "labeler": "reference",
                    **{key: value for key, value in row.items() if key != "prompt"},
                }
            )
    return chosen


def card(config: WorldConfig, files: Files) -> dict[str, Any]:
    """Counts, shares and mean quality: what a reader should know before using the files."""
    asked = files["demonstrations"] + files["prompts_rm"] + files["prompts_ppo"]
    demonstrations = files["demonstrations"]
    gold = [judge(row, row["completion"]).likert for row in demonstrations]
    by_use_case: dict[str, list[float]] = {}
    for row, score in zip(demonstrations, gold, strict=True):
        by_use_case.setdefault(row["use_case"], []).append(score)
    settings = {key: value for key, value in vars(config).items() if key != "output_dir"}
    return {
        "config": settings,
        "rows": {name: len(rows) for name, rows in sorted(files.items())},
        "customers": {
            "train": len({row["customer"] for row in asked}),
            "largest": max(Counter(row["customer"] for row in asked).values(), default=0),
        },
        "shares": {
            "use_case": _shares(row["use_case"] for row in asked),
            "language": _shares(row["language"] for row in asked),
            "constraint": _shares(row["constraint"] or "none" for row in asked),
            "sensitive": _mean([prompts.is_sensitive(row) for row in asked]),
            "only_looks_sensitive": _mean([prompts.only_looks_sensitive(row) for row in asked]),
            "with_a_habit": _mean([labelers.habit_of(row) is not None for row in asked]),
        },
        "demonstrations": {
            "gold": _mean(gold),
            "perfect": _mean([score >= 6.95 for score in gold]),
            "gold_by_use_case": {key: _mean(scores) for key, scores in sorted(by_use_case.items())},
        },
        "degenerate_policies": {
            name: round(score, 3) for name, score in policies.score_table(files["prompts_test"]).items()
        }
        if files["prompts_test"]
        else {},
    }


def _mean(values: list[Any]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def _shares(values: Iterable[str]) -> dict[str, float]:
    counts = Counter(values)
    return {key: round(count / counts.total(), 4) for key, count in sorted(counts.items())}


def save(config: WorldConfig, files: Files, facts: dict[str, Any]) -> Path:
    """Writes all files to a temporary folder and moves it into place: complete or absent."""
    output = Path(config.output_dir)
    if output.exists() and any(output.iterdir()) and not (output / "card.json").is_file():
        raise UserError(f"{output}: holds something else than a world; choose another output_dir")
    with atomic_folder(output) as folder:
        for name, rows in files.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
        write_json(folder / "card.json", facts)
    return output
