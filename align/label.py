"""`align label FILE... --labelers NAME... --output FOLDER`: a page a labeler, on which people rank K answers.

    collect without `labelers`  ->  train_to_label.jsonl  ->  NAME.html  ->  rankings-NAME.jsonl  ->  rm

A page is one file that needs no server and sends nothing: it opens in a browser, keeps the work there, and downloads
the rankings, ties among them, as rows that `rm` reads (paper section 3.4, App. C.2). Who answers which prompt and in
which order answers stand is drawn by chance, the same for the same seed. Work belongs to a row and a labeler, so a page
that is made again, with more rows or other labelers, still has it.
"""

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align.data import parse_row
from align.errors import UserError
from align.files import atomic_file, plain
from align.rows import Problem, count_kinds, read_rows
from align.types import Ranking, Text, contents

FOLDER, TEMPLATE, SCRIPT = Path(__file__).parent, "label.html.jinja", "label.js"
NAME = re.compile(r"[\w.-]+")
SHOWN = 20  # bad rows printed
MADE = ("completions", "labeler", "label_task", "finished")  # columns that a ranking gets anew, or that no longer fit
INSTRUCTIONS = """Rank the answers from best (1) to worst. Answers of equal worth get the same rank.
Judge by what the writer of the prompt wanted: does the answer do that, is it true, does it harm nobody?"""


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="align label", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help='rows of {"prompt", "completions"}, ranks or none')
    parser.add_argument("--labelers", nargs="+", required=True, metavar="NAME", help="each gets a page")
    parser.add_argument("--per_prompt", type=int, default=1, help="how many of them rank a prompt; 2: see who agrees")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where NAME.html is written")
    parser.add_argument("--instructions", metavar="FILE", help="text at the top of each page, in place of two lines")
    parser.add_argument("--seed", type=int, default=0, help="of who ranks what, in which order")
    args = parser.parse_args(argv)
    if bad := [name for name in args.labelers if not NAME.fullmatch(name)]:
        parser.error(f"--labelers: {bad[0]!r} names a file: letters, digits, dots, dashes and underscores")
    if len({name.casefold() for name in args.labelers}) < len(args.labelers):
        parser.error("--labelers: one is given twice")
    if not 1 <= args.per_prompt <= len(args.labelers):
        parser.error(f"--per_prompt {args.per_prompt}: between 1 and the {len(args.labelers)} labelers")
    return args


def main(argv: list[str]) -> int:
    """Raises UserError where no row can be ranked."""
    args = arguments(argv)
    instructions = read_text(args.instructions) if args.instructions else INSTRUCTIONS
    tasks, problems = read_tasks(args.files)
    for problem in problems[:SHOWN]:
        print(problem)
    if problems:
        print(f"{len(problems)} of {len(tasks) + len(problems)} rows left out ({count_kinds(problems)})")
    if not tasks:
        raise UserError(f"{', '.join(args.files)}: no row has answers to rank: `collect` without labelers writes some")
    for labeler, dealt in deal(tasks, args.labelers, args.per_prompt, args.seed).items():
        path = Path(args.output) / f"{labeler}.html"
        with atomic_file(path) as file:
            file.write_text(page(labeler, dealt, instructions, path.resolve().parent.name), encoding="utf-8")
        sizes = [len(task["texts"]) for task in dealt]
        print(f"{path}: {len(dealt)} prompts, {min(sizes)} to {max(sizes)} answers each")
    print("each labeler opens a page in a browser and downloads rankings from it; `align validate` checks them for rm")
    return 0


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--instructions: {path}: cannot be read ({error}); give a text file in UTF-8") from None


def read_tasks(paths: Sequence[str]) -> tuple[list[dict[str, Any]], list[Problem]]:
    """What is to be ranked, and the rows that cannot be.

    A task is what the page needs of a row: `head` and `items`, the JSON of its columns and of each answer, which a
    ranking is put together of; `messages` and `texts` to show; `key`, which tells it from all others.
    """
    tasks, problems, seen = [], [], Counter()
    for path in paths:
        for place, row in read_rows(path):
            found = task_of(place, row, seen)
            (problems if isinstance(found, Problem) else tasks).append(found)
    return tasks, problems


def task_of(place: str, row: Any, seen: Counter[str]) -> dict[str, Any] | Problem:
    """Of a row without its ranks and with each answer once."""
    items = row.get("completions") if isinstance(row, Mapping) else None
    if isinstance(items, list):
        items = [{"completion": item} if isinstance(item, str) else item for item in items]
        first = {answer_text(item): i for i, item in reversed(list(enumerate(items)))}
        items = [items[i] for i in sorted(first.values())]
        items = [item | {"rank": i} if isinstance(item, Mapping) else item for i, item in enumerate(items)]
        row = dict(row) | {"completions": items}  # ranked somehow, so that our own check takes it
    record = parse_row("ranking", place, row, Counter())
    if isinstance(record, Problem):
        return record
    if items is None:
        return Problem(place, "missing_field", "'completions' is missing", "make it of the row's answers")
    head = as_json({key: value for key, value in row.items() if key not in MADE})
    parts = [as_json({key: value for key, value in item.items() if key != "rank"}) for item in items]
    content = json.dumps([head, *parts])
    seen[content] += 1
    key = hashlib.sha256(f"{content} {seen[content]}".encode()).hexdigest()[:16]
    return {"key": key, "head": head, "items": parts, "messages": messages(record.prompt), "texts": texts(record)}


def as_json(row: Mapping[str, Any]) -> str:
    """What the page passes on without reading it: JavaScript would round long integers, and has no NaN."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False)


def answer_text(item: Any) -> str:
    """What makes two answers the same: their text, as the loader of rankings sees it."""
    answer = item.get("completion") if isinstance(item, Mapping) else item
    if isinstance(answer, list) and all(isinstance(part, Mapping) and "content" in part for part in answer):
        answer = contents(tuple(part | {"content": str(part["content"])} for part in answer))
    return answer.strip() if isinstance(answer, str) else json.dumps(answer)


def messages(prompt: Text) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "prompt", "content": prompt}]
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def texts(record: Ranking) -> list[str]:
    return [contents(completion) for completion in record.completions]


def deal(
    tasks: list[dict[str, Any]], labelers: Sequence[str], per_prompt: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Labeler -> tasks with the order in which the page shows their answers. Each has the same number, give or take
    one; nobody gets a row twice, and who share a prompt changes from prompt to prompt."""
    rng = random.Random(f"label {seed}")
    dealt: dict[str, list[dict[str, Any]]] = {labeler: [] for labeler in labelers}
    for task in tasks:
        waiting = sorted(labelers, key=lambda labeler: (len(dealt[labeler]), rng.random()))
        for labeler in waiting[:per_prompt]:
            order = list(range(len(task["texts"])))
            rng.shuffle(order)
            dealt[labeler].append(task | {"order": order})
    empty = [labeler for labeler, own in dealt.items() if not own]
    if empty:
        raise UserError(f"--labelers: {len(tasks)} prompts are too few: none for {empty[0]}")
    return dealt


def page(labeler: str, tasks: list[dict[str, Any]], instructions: str, name: str) -> str:
    """One HTML file. Texts are in it as JSON without `<`, so that none can end its element."""
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    data = {"name": name, "labeler": labeler, "tasks": tasks}
    script = (FOLDER / SCRIPT).read_text(encoding="utf-8")
    return environment.get_template(TEMPLATE).render(
        labeler=labeler, data=data, script=script, instructions=instructions
    )
