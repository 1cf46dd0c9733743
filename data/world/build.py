"""Builds the world's files: prompts of one pool, their customers dealt to the splits, and text that repeats none."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from align.errors import UserError
from align.files import atomic_folder, write_json, write_jsonl
from data.world import labelers, policies, prompts
from data.world.config import WorldConfig
from data.world.judge import judge
from data.world.prompts import MAX_PER_CUSTOMER, Row, stream
from data.world.text import spoken, write_text

Files = dict[str, list[dict[str, Any]]]
FEW_SHOT_FAMILIES = ("story_two", "colour", "list", "opposite_phrase", "greet", "note", "summary", "kind")


def build(config: WorldConfig) -> tuple[Files, dict[str, Any]]:
    """Every file's rows by name, and the data card."""
    seed = config.seed
    wanted = {
        "prompts_test": config.num_test_prompts,
        "prompts_validation": config.num_validation_prompts,
        "prompts_rm_validation": config.num_rm_prompts_validation,
        "demonstrations_validation": config.num_demonstrations_validation,
    }
    sizes = (config.num_demonstrations, config.num_rm_prompts, config.num_ppo_prompts)
    spare = MAX_PER_CUSTOMER * len(wanted)  # what of a file's last customer no longer fits is nobody's
    pool = prompts.write_prompts(seed, "all", sum(wanted.values()) + sum(sizes) + spare, set())
    files, train = deal(pool, wanted, stream(seed, "shuffle"))
    held_out = frozenset(row["prompt"] for rows in files.values() for row in rows)
    files["demonstrations_validation"] = demonstrate(seed, files["demonstrations_validation"])

    first, second, end = accumulate(sizes)
    files["demonstrations"] = demonstrate(seed, train[:first])
    files["prompts_rm"], files["prompts_ppo"] = train[first:second], train[second:end]
    files["few_shot"] = few_shot(train[:first], config.num_few_shot)

    for name, number in (("text", config.num_documents), ("text_validation", config.num_text_validation)):
        files[name] = [{"text": text} for text in write_text(seed, name, number, held_out)]
    return files, card(config, files)


def deal(pool: list[Row], wanted: Mapping[str, int], rng: Random) -> tuple[Files, list[Row]]:
    """Customers drawn for the held-out files until each has the rows it wants, and the rows of all others, shuffled.

    Small families run out of new prompts towards the pool's end; dealt so, every file has the same mixture.
    """
    by_customer: dict[str, list[Row]] = {}
    for row in pool:
        by_customer.setdefault(row["customer"], []).append(row)
    customers = list(by_customer)
    rng.shuffle(customers)
    files: Files = {}
    for name, number in wanted.items():
        files[name] = []
        while len(files[name]) < number:
            files[name] += by_customer[customers.pop()]
        del files[name][number:]
    train = [row for customer in customers for row in by_customer[customer]]
    rng.shuffle(train)
    return files, train


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
