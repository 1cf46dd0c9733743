"""Public formats -> our rows: which reader takes which file, and the count of what it read, used and dropped.

    conversion = read(["hh.jsonl.gz", "en_100_tree.jsonl"], to="ranking")

A format is found from the fields of a file's rows, or named. Files of one format are read as one data set, so that
judgements join across shards; some formats need a second file beside them (`partner`). Every row that comes out has
passed `align.data.parse_row`; a unit that nothing names would be reported as `unnamed`, so none is lost in silence.
"""

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import NOTES, answer_columns, parse_row
from align.errors import UserError
from align.readers import annotation, benchmarks, chat, pairwise, passages, ranked
from align.readers.base import Converted, Note, Options, Output, Reader, Record, as_json
from align.readers.files import read_records, suffix
from align.rows import Problem, count_kinds
from align.splits import prompt_key
from align.types import Demonstration, Ranking, contents

SAMPLE = 100  # rows that decide a file's format
KINDS = ("demonstration", "ranking", "prompt", "text")
# field -> kind; the first that a row has decides
OURS = dict.fromkeys(("completions", "chosen", "rejected"), "ranking")
OURS |= dict.fromkeys(("messages", "completion"), "demonstration") | {"prompt": "prompt", "text": "text"}
NAMES_A_MODEL = re.compile(r"language model|OpenAI|ChatGPT|语言模型", re.IGNORECASE)


@dataclass(frozen=True)
class Format:
    """How to know a public format's rows, and the readers by the kind of row they give; the first is the usual one."""

    matches: Callable[[Any], bool]
    readers: Mapping[str, Reader]
    partner: str | None = None  # a format whose files this one joins to its own
    foreign: bool = True  # the stages cannot read its rows as they are


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda row: isinstance(row, Mapping) and all(row.get(name) is not None for name in names)


def _texts(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether one of the fields is a list of texts."""
    lists = [row[name] for name in names if isinstance(row.get(name), (list, tuple))]
    return any(one and all(isinstance(text, str) for text in one) for one in lists)


def _is_hh(row: Any) -> bool:
    """Dialogues whole, or (rm-static) the answers alone beside the dialogue as `prompt`."""
    texts = [str(row.get(name) or "").lstrip() for name in ("chosen", "prompt")] if isinstance(row, Mapping) else []
    return _has("chosen", "rejected")(row) and any(text.startswith("Human:") for text in texts)


def _is_scored(row: Any) -> bool:
    if not isinstance(row, Mapping):
        return False
    answers = row.get("completions") or row.get("responses")
    if not isinstance(answers, list) or not answers:
        return False
    objects = all(isinstance(one, Mapping) and "rank" not in one for one in answers)
    beside = any(isinstance(row.get(name), list) for name in ranked.SCORE_LISTS)
    return beside or (objects and any(name in answers[0] for name in ranked.SCORES))


def _is_ranked_list(row: Any) -> bool:
    asked = isinstance(row, Mapping) and any(name in row for name in ("instruction", "prompt", "question"))
    return asked and _texts(row, ranked.BEST_FIRST)


def _is_nectar(row: Any) -> bool:
    answers = row.get("answers") if _has("prompt", "answers")(row) else None
    return isinstance(answers, list) and bool(answers) and all(_has("answer", "rank")(one) for one in answers)


def _is_argilla(row: Any) -> bool:
    if not isinstance(row, Mapping) or _has("fields", "responses")(row):
        return isinstance(row, Mapping)
    lists = [value for value in row.values() if isinstance(value, list) and value and isinstance(value[0], Mapping)]
    return any(name.endswith(".responses") for name in row) or any("user_id" in one[0] for one in lists)


def _is_squad(row: Any) -> bool:
    articles = row.get("data") if isinstance(row, Mapping) and isinstance(row.get("data"), list) else [row]
    return bool(articles) and _has("paragraphs")(articles[0])


def _is_answers(row: Any) -> bool:
    """SafetyBench's answers: one object of ids."""
    return isinstance(row, Mapping) and bool(row) and all(_has("answer", "category")(one) for one in row.values())


def _is_unpaired(row: Any) -> bool:
    return _has("prompt", "completion", "label")(row) and isinstance(row["label"], bool)


def _is_answered(row: Any) -> bool:
    """A prompt and a `response`, with no other answer, and no number that may rate it."""
    if not _has("prompt", "response")(row) or not all(isinstance(row[name], str) for name in ("prompt", "response")):
        return False
    rated = any(isinstance(value, (int, float)) for name, value in row.items() if "id" not in str(name).lower())
    named = any(row.get(name) is not None for name in OURS if name != "prompt")
    return not rated and not named and answer_columns(row) == ["response"]


def _prompts(reader: Reader, matches: Callable[[Any], bool]) -> Format:
    return Format(matches, {"prompt": reader})


# From the most particular to the most general: the first that matches is taken.
FORMATS: dict[str, Format] = {
    "oasst": Format(
        _has("message_tree_id"),
        {
            "ranking": ranked.oasst_groups,
            "demonstration": ranked.oasst_demonstrations,
            "prompt": ranked.oasst_prompts,
        },
    ),
    "qa_feedback": Format(
        _has("question", "prediction 1", "preference"),
        {"ranking": pairwise.qa_pairs, "demonstration": pairwise.qa_demonstrations},
    ),
    "pandalm": Format(_has("instruction", "response1", "response2", "annotator1"), {"ranking": pairwise.pandalm_pairs}),
    "safe_rlhf": Format(_has("response_0", "response_1", "better_response_id"), {"ranking": pairwise.safe_rlhf_pairs}),
    "helpsteer": Format(
        lambda row: (
            _has("response_1", "response_2", "preference_strength")(row)
            or _has("response1", "response2", "overall_preference")(row)
        ),
        {"ranking": pairwise.helpsteer_pairs},
    ),
    "summarize_from_feedback": Format(_has("info", "summaries", "choice"), {"ranking": pairwise.summary_pairs}),
    "nectar": Format(_is_nectar, {"ranking": ranked.nectar_rankings}),
    "pairwise": Format(
        lambda row: _has("winner")(row) and any(name in row for name in pairwise.ANSWERS),
        {"ranking": pairwise.ab_pairs},
    ),
    "squality_reviews": Format(
        _has("passage-id", "questions"), {"ranking": ranked.squality_reviews}, partner="squality"
    ),
    "squality": Format(
        _has("document", "questions"),
        {"demonstration": passages.squality_demonstrations, "text": passages.squality_texts},
    ),
    "squad": Format(_is_squad, {"text": passages.squad_texts, "demonstration": passages.squad_demonstrations}),
    "self_instruct": Format(_has("instruction", "instances"), {"demonstration": chat.self_instruct}),
    "label_studio": Format(
        lambda row: _has("data", "annotations")(row) or _has("annotation_id")(row), {"ranking": annotation.label_studio}
    ),
    "argilla": Format(_is_argilla, {"ranking": annotation.argilla}),
    "sharegpt_pairs": Format(_has("conversations", "chosen", "rejected"), {"ranking": chat.sharegpt_pairs}),
    "sharegpt": Format(_has("conversations"), {"demonstration": chat.sharegpt_rows}),
    "scores": Format(_is_scored, {"ranking": ranked.scored_rows}),
    "unpaired": Format(
        _is_unpaired,
        {"ranking": chat.unpaired_rankings, "demonstration": chat.unpaired_demonstrations},
        foreign=False,
    ),
    "hh": Format(_is_hh, {"ranking": chat.hh_rows}, foreign=False),
    "ranked_list": Format(_is_ranked_list, {"ranking": ranked.ranked_lists}),
    "alpaca": Format(
        lambda row: _has("instruction", "output")(row) or _has("instruction", "response")(row),
        {"demonstration": chat.alpaca_rows},
    ),
    "response": Format(_is_answered, {"demonstration": chat.answered_rows}),
    "mt_bench": _prompts(benchmarks.turns, _has("question_id", "turns")),
    "truthfulqa": _prompts(benchmarks.truthfulqa, _has("Best Answer", "Correct Answers")),
    "truthfulqa_mc": _prompts(benchmarks.truthfulqa_mc, _has("question", "mc1_targets")),
    "halluqa": _prompts(benchmarks.halluqa, _has("Question", "Best Answer1")),
    "halluqa_mc": _prompts(benchmarks.halluqa_mc, _has("question_id", "question", "answer")),
    "gsm8k": _prompts(benchmarks.gsm8k, lambda row: _has("question", "answer")(row) and "####" in str(row["answer"])),
    "bbq": _prompts(benchmarks.bbq, _has("context", "question", "ans0", "ans1", "ans2")),
    "crows_pairs": _prompts(benchmarks.crows_pairs, _has("sent_more", "sent_less")),
    "winogender": _prompts(benchmarks.sentence, _has("sentence")),
    "winogender_statistics": _prompts(benchmarks.no_text, _has("occupation", "bls_pct_female")),
    "cold": _prompts(benchmarks.cold, _has("TEXT", "fine-grained-label")),
    "safetybench": Format(
        _has("id", "options", "question"), {"prompt": benchmarks.safetybench}, partner="safetybench_answers"
    ),
    "safetybench_answers": _prompts(benchmarks.safetybench, _is_answers),
    "xstest": Format(_has("prompt", "focus", "type"), {"prompt": benchmarks.asked}, foreign=False),
    "humaneval": Format(_has("prompt", "canonical_solution"), {"prompt": benchmarks.asked}, foreign=False),
    "ifeval": Format(_has("prompt", "instruction_id_list"), {"prompt": benchmarks.asked}, foreign=False),
    "trl": Format(lambda row: our_kind([row]) is not None, {}, foreign=False),
    "strings": _prompts(chat.strings, lambda row: isinstance(row, str)),
    "prose": Format(lambda row: False, {"text": passages.prose}),  # known by .txt
}


@dataclass
class Conversion:
    """What became of one data set: rows with the places they came from, and everything that was dropped or mended.

    `units == used + len(problems)`.
    """

    paths: tuple[str, ...]
    format: str
    kind: str
    rows: list[Converted] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def used(self) -> int:
        return len({place for row in self.rows for place in (*row.places, *row.partners)})

    @property
    def units(self) -> int:
        return self.used + len(self.problems)

    def summary(self) -> str:
        text = f"{', '.join(self.paths)}: {self.format} -> {self.kind}: {self.units} read, {self.used} used"
        text += f", {len(self.problems)} dropped" + (f" ({count_kinds(self.problems)})" if self.problems else "")
        text += f"; {len(self.rows)} rows"
        notes = Counter(note.kind for note in self.notes)
        return text + "".join(f"; {count} {kind}" for kind, count in notes.most_common())


def detect_format(rows: Iterable[Any]) -> str | None:
    """The format that most of `rows` have; None when none has any."""
    found: Counter[str] = Counter()
    for row in rows:
        if _has("prompt", "eval_only")(row):  # a benchmark that was converted before, its columns kept
            found["trl"] += 1
            continue
        found.update([name for name, one in FORMATS.items() if one.matches(row)][:1])
    return found.most_common(1)[0][0] if found else None


def our_kind(rows: Iterable[Any]) -> str | None:
    """The kind of rows in our own (TRL's) format."""
    found: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, Mapping):
            found.update([kind for name, kind in OURS.items() if row.get(name) is not None][:1])
    return found.most_common(1)[0][0] if found else None


def read(
    paths: list[str], format: str | None = None, to: str | None = None, options: Options | None = None
) -> list[Conversion]:
    """A Conversion for each format that the files have, in the order of the files.

    Raises UserError for a file that cannot be read or is of no known format, and when it has no rows of kind `to`.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"--format {format}: unknown: choose one of {', '.join(FORMATS)}")
    sources: dict[str, Source] = defaultdict(list)
    heads: dict[str, list[Any]] = defaultdict(list)
    for path in paths:
        records = read_records(path)
        head = list(itertools.islice(records, SAMPLE))
        name = format or ("prose" if suffix(path) == ".txt" else detect_format(row for _, row in head))
        if name is None:
            what = "no row is of a known format" if head else "has no rows"
            raise UserError(f"{path}: {what}: name one with --format, see docs/formats.md")
        sources[name].append((path, itertools.chain(head, records)))
        heads[name] += [row for _, row in head]
    for name in list(sources):
        partner = FORMATS[name].partner
        if partner in sources and (to is None or to in FORMATS[name].readers):
            sources[name] += sources.pop(partner)
    return [_convert(name, source, heads[name], to, options or Options()) for name, source in sources.items()]


Source = list[tuple[str, Iterator[tuple[str, Any]]]]  # of each file its path and rows; a row may be a Problem


def _convert(name: str, source: Source, head: list[Any], to: str | None, options: Options) -> Conversion:
    paths = tuple(path for path, _ in source)
    readers = dict(FORMATS[name].readers) or {our_kind(head) or "prompt": chat.trl_rows}
    kind = to or next(iter(readers))
    asking = next((own for own in readers if own != "text"), None)
    if asking is not None:
        readers.setdefault("prompt", prompts_of(asking, readers[asking]))
    if kind not in readers:
        raise UserError(f"{paths[0]}: {name} gives no {kind}: choose --to from {', '.join(sorted(readers))}")
    conversion = Conversion(paths, name, kind)
    read_places: list[str] = []

    def records() -> Iterator[Record]:
        for place, row in itertools.chain.from_iterable(rows for _, rows in source):
            if isinstance(row, Problem):  # what could not be read at all is no reader's matter
                conversion.problems.append(row)
            else:
                read_places.append(place)
                yield place, row

    for output in readers[kind](records(), options):
        _sort(output, conversion)
    _name_the_rest(read_places, conversion)
    return conversion


def _sort(output: Output, conversion: Conversion) -> None:
    """Put a reader's output where it belongs; a row that our own check refuses is dropped with all of its units."""
    if isinstance(output, Problem):
        conversion.problems.append(output)
        return
    if isinstance(output, Note):
        conversion.notes.append(output)
        return
    place, mended = output.places[0], Counter()
    record = parse_row(conversion.kind, place, output.row, mended)
    if isinstance(record, Problem):
        conversion.problems += _all_places(output, record)
        return
    conversion.notes += [Note(place, kind, NOTES[kind]) for kind in mended]
    answers = [record.completion] if isinstance(record, Demonstration) else []
    answers = record.completions if isinstance(record, Ranking) else answers
    if any(NAMES_A_MODEL.search(contents(answer)) for answer in answers):
        conversion.notes.append(Note(place, "names_a_model", "an answer names a language model or its maker: kept"))
    conversion.rows.append(output)


def _name_the_rest(read_places: list[str], conversion: Conversion) -> None:
    """A row that no output names is a reader's fault; it is reported, not lost."""
    named = {problem.place for problem in conversion.problems}
    named |= {place for row in conversion.rows for place in (*row.places, *row.partners)}
    named |= {place[: comma.start()] for place in named for comma in re.finditer(", ", place)}
    for place in read_places:
        if place not in named:
            conversion.problems.append(Problem(place, "unnamed", "was lost by its reader", "report it as a bug"))


def prompts_of(kind: str, reader: Reader) -> Reader:
    """The prompts alone of the rows of `kind` that a reader gives, each once."""

    def prompts(records: Iterable[Record], options: Options) -> Iterator[Output]:
        seen: dict[str, str] = {}
        for output in reader(records, options):
            if not isinstance(output, Converted):
                yield output
                continue
            record = parse_row(kind, output.places[0], output.row, Counter())
            if isinstance(record, Problem):
                yield from _all_places(output, record)
                continue
            place = seen.setdefault(prompt_key(record.prompt), output.places[0])
            if place == output.places[0]:
                unread = answer_columns(record.columns)  # prompts were asked for: answers stay behind
                rest = {name: value for name, value in record.columns.items() if name not in unread}
                yield Converted({"prompt": as_json(record.prompt), **rest}, output.places, output.partners)
            else:
                again = Problem(place, "repeated_prompt", f"its prompt is also at {place}", "it is taken once")
                yield from _all_places(output, again)

    return prompts


def _all_places(converted: Converted, problem: Problem) -> list[Problem]:
    """The same Problem for each unit of a row."""
    return [dataclasses.replace(problem, place=place) for place in converted.places]


def stem(path: str) -> str:
    """A file's name without its suffixes: the source of its rows."""
    return Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]
