"""All the real data files, read in place: no row is lost without a name, and each known trap is found.

Set ALIGN_DATA to the folder that holds them; without it they are looked for beside the repository.
"""

import itertools
import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from align.data import parse_row
from align.readers.files import read_records
from align.readers.reading import Conversion, read
from align.rows import Problem
from align.splits import prompt_key, split_of
from align.stats import parsed
from align.types import Ranking
from align.validate import validate

ROOT = Path(os.environ.get("ALIGN_DATA", Path(__file__).parents[2] / "shared" / "data"))

# file -> format, units, rows, what is dropped. The counts are those that the files' own documentation gives, or follow
# from it by the rules of docs/formats.md.
FILES: dict[str, tuple[str, int, int, dict[str, int]]] = {
    "bbq/Sexual_orientation.jsonl": ("bbq", 864, 864, {}),
    "cbbq-zh/disease-ambiguous.csv": ("bbq", 586, 586, {}),
    "cbbq-zh/disease-disambiguous.csv": ("bbq", 586, 586, {}),
    "cmrc2018-zh/cmrc2018_dev.json": ("squad", 848, 848, {}),
    "cold-zh/test.csv": ("cold", 5323, 5323, {}),
    "crows-pairs/crows_pairs_anonymized.csv": ("crows_pairs", 1508, 1508, {}),
    "cvalues-zh/cvalues_responsibility_prompts.jsonl": ("trl", 664, 664, {}),
    "gsm8k/test.jsonl": ("gsm8k", 1319, 1319, {}),
    "halluqa/HalluQA.json": ("halluqa", 450, 450, {}),
    "halluqa/HalluQA_mc.json": ("halluqa_mc", 450, 450, {}),
    "hh-rlhf/harmless-base-test.jsonl.gz": ("hh", 2312, 2303, {"prompt_mismatch": 5, "empty_field": 4}),
    "humaneval/HumanEval.jsonl.gz": ("humaneval", 164, 164, {}),
    "ifeval/input_data.jsonl": ("ifeval", 541, 541, {}),
    "mt-bench-zh/question.jsonl": ("mt_bench", 80, 80, {}),
    "mt-bench/mt_bench_question.jsonl": ("mt_bench", 80, 80, {}),
    "mt-bench/vicuna_bench_question.jsonl": ("mt_bench", 80, 80, {}),
    "oasst-en/en_100_tree.jsonl": ("oasst", 211 + 43, 212, {"one_reply": 40, "no_rank": 2}),
    "oasst-en/prompt_lottery_en_250_text.jsonl": ("strings", 250, 250, {}),
    "oasst-zh/oaast_rm_zh.json": ("ranked_list", 775, 772, {"duplicate_completions": 3}),
    "oasst-zh/oaast_sft_zh.json": ("alpaca", 689, 689, {}),
    # A row whose answer is empty (55) or was turned into true or false (6) counts once, the others once an annotator.
    "pandalm/testset-v1.json": (
        "pandalm", 3 * (999 - 61) + 61, 1282,
        {"all_ties": 181, "empty_field": 55, "wrong_type": 6, "intransitive": 26, "contradiction": 4},
    ),
    "ptx-en-shakespeare/input.txt": ("prose", 1, 610, {}),
    "qa-feedback/dev_feedback.json": ("qa_feedback", 3000, 504, {"all_ties": 128}),  # 12 prompts of 6, and 56 alone
    "safetybench-zh/test_answers_zh_subset.json": ("safetybench_answers", 2100, 0, {"no_partner": 2100}),
    "safetybench-zh/test_zh_subset.json": ("safetybench", 2100, 2100, {}),
    "self-instruct/seed_tasks.jsonl": ("self_instruct", 175, 175, {}),
    "self-instruct/user_oriented_instructions.jsonl": ("self_instruct", 252, 252, {}),
    "squality/human-eval-all-responses.jsonl": ("squality_reviews", 100, 0, {"no_partner": 100}),
    "squality/v1-3-txt-test.jsonl": ("squality", 1040, 1040, {}),
    "truthfulqa/TruthfulQA.csv": ("truthfulqa", 817, 817, {}),
    "truthfulqa/mc_task.json": ("truthfulqa_mc", 817, 817, {}),
    "winogender/all_sentences.tsv": ("winogender", 720, 720, {}),
    "winogender/occupations-stats.tsv": ("winogender_statistics", 60, 0, {"no_text": 60}),
    "winogender/templates.tsv": ("winogender", 120, 120, {}),
    "xstest/xstest_prompts.csv": ("xstest", 450, 450, {}),
}  # fmt: skip


def real(*names: str, to: str | None = None) -> Conversion:
    missing = [name for name in names if not (ROOT / name).exists()]
    if missing:
        pytest.skip(f"real data file {missing[0]} is not here; set ALIGN_DATA to the folder that holds it")
    return converted(names, to)


@cache
def converted(names: tuple[str, ...], to: str | None) -> Conversion:
    (conversion,) = read([str(ROOT / name) for name in names], to=to)
    return conversion


def places(conversion: Conversion, kind: str) -> set[str]:
    """Of the dropped or noted units of a kind the place inside the file."""
    found = [*conversion.problems, *conversion.notes]
    return {
        re.split(r"[:,] ", one.place.split(conversion.paths[0])[1].lstrip(":"))[0] for one in found if one.kind == kind
    }


@pytest.mark.parametrize("name", FILES)
def test_no_row_is_lost_without_a_name(name):
    form, units, rows, dropped = FILES[name]
    conversion = real(name)
    assert conversion.format == form
    assert conversion.units == units and conversion.used == units - sum(dropped.values())
    assert len(conversion.rows) == rows and Counter(p.kind for p in conversion.problems) == dropped
    # Every record of the file is named by what came out, and every unit by one thing alone.
    used = {place for row in conversion.rows for place in row.places}
    named = [problem.place for problem in conversion.problems]
    assert len(named) == len(set(named)) and used.isdisjoint(named)
    records = {place for place, _ in read_records(str(ROOT / name))}
    assert records == {place.split(", ")[0] for place in used.union(named)}


@pytest.mark.parametrize("name", FILES)
def test_what_comes_out_passes_our_own_check(name):
    conversion = real(name)
    for row in conversion.rows:
        assert not isinstance(parse_row(conversion.kind, row.places[0], row.row, Counter()), Problem)


@pytest.mark.parametrize(
    ("names", "rows", "dropped"),
    [
        (("truthfulqa/mc_task.json",), 817, {}),
        (("halluqa/HalluQA_mc.json",), 446, {"repeated_choice": 4}),
        (("bbq/Sexual_orientation.jsonl",), 864, {}),
        (("cbbq-zh/disease-ambiguous.csv",), 586, {}),
        (("crows-pairs/crows_pairs_anonymized.csv",), 1508, {}),
        (("winogender/all_sentences.tsv",), 240, {"no_gender": 240}),
        (("safetybench-zh/test_zh_subset.json", "safetybench-zh/test_answers_zh_subset.json"), 2098,
         {"repeated_choice": 2}),
    ],
)  # fmt: skip
def test_benchmarks_as_choices(names, rows, dropped):
    conversion = real(*names, to="choice")
    assert len(conversion.rows) == rows and Counter(p.kind for p in conversion.problems) == dropped
    records = [parse_row("choice", row.places[0], row.row, Counter()) for row in conversion.rows]
    paired = "crows" in names[0] or "winogender" in names[0]
    assert all(bool(record.right) is not paired and (record.prompt is None) is paired for record in records)
    assert all(row.row["eval_only"] for row in conversion.rows)


def test_every_data_file_is_in_the_table():
    """Whatever lies in the folder, whole or not, is in the table, a licence, or one of three documents about it."""
    if not ROOT.is_dir():
        pytest.skip("no real data here; set ALIGN_DATA to the folder that holds it")
    documents = {"README.md", "SHA256SUMS", "squality/UPSTREAM-human-eval-README.md"}
    here = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()} - documents
    assert {name for name in here if not re.search(r"LICEN[CS]E", name)} <= set(FILES)


def test_hh_rows_are_the_ones_that_its_documentation_names():
    conversion = real("hh-rlhf/harmless-base-test.jsonl.gz")  # the documentation counts from 0, places from 1
    assert places(conversion, "prompt_mismatch") == {str(n + 1) for n in (1254, 1688, 1950, 1952, 2036)}
    assert places(conversion, "empty_field") == {str(n + 1) for n in (86, 516, 925, 1103)}


def test_qa_feedback_judgements_become_rankings():
    conversion = real("qa-feedback/dev_feedback.json")
    assert len(places(conversion, "weak_transitivity")) == 22
    wholly = Counter(problem.place.split(", ")[0] for problem in conversion.problems)
    assert sum(count == 6 for count in wholly.values()) == 12
    strict = sum(a != b for r in parsed(conversion) for a, b in itertools.combinations(r.ranks, 2))
    assert strict == 1577 + 1039  # every preference that was stated, none invented and none lost


def pairs_of(ranking: Ranking):
    for chosen in itertools.combinations(zip(ranking.completions, ranking.ranks, strict=True), 2):
        completions, ranks = zip(*chosen, strict=True)
        yield Ranking(ranking.prompt, completions, ranks, ranking.labeler)


def test_pandalm_keeps_every_preference_that_no_rule_takes_out():
    conversion = real("pandalm/testset-v1.json")
    said: dict[str, Counter[str]] = {}
    for ranking in (pair for whole in parsed(conversion) for pair in pairs_of(whole)):
        better = ranking.completions[ranking.ranks.index(min(ranking.ranks))]
        verdict = better if len(set(ranking.ranks)) > 1 else "tie"
        said.setdefault(ranking.labeler, Counter())[
            prompt_key(ranking.prompt), frozenset(ranking.completions), verdict
        ] += 1
    assert set(said) == {"annotator1", "annotator2", "annotator3"}
    refused = {problem.place for problem in conversion.problems}
    for place, row in read_records(conversion.paths[0]):
        if place in refused:  # an empty or broken answer
            continue
        asked = f"{row['instruction']} {row['input']}"
        answers = (row["response1"].strip(), row["response2"].strip())
        for name, pairs in said.items():
            if f"{place}, {name}" not in refused:
                verdict = ("tie", *answers)[row[name]]
                assert pairs[prompt_key(asked), frozenset(answers), verdict] == 1


def test_oasst_model_written_replies():
    ranked = real("oasst-en/en_100_tree.jsonl")
    assert sum(note.kind == "model_written" for note in ranked.notes) == 5
    sizes = Counter(len(record.completions) for record in parsed(ranked))
    # The documentation's 211 groups; one more, of K = 3, has an unranked reply beside the three ranked ones.
    assert sizes == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    assert all(record.columns["language"] == "en" for record in parsed(ranked))
    shown = real("oasst-en/en_100_tree.jsonl", to="demonstration")
    assert shown.units == 254 and Counter(p.kind for p in shown.problems) == {
        "one_reply": 40, "model_written": 5, "no_rank": 2,
    }  # fmt: skip


def test_oasst_zh_repeated_completions_and_answers_pasted_from_models():
    conversion = real("oasst-zh/oaast_rm_zh.json")
    repeated = places(conversion, "duplicate_completions") | places(conversion, "repeated_completion")
    assert len(repeated) == 6
    assert sum(note.kind == "names_a_model" for note in conversion.notes) > 90


def test_prompts_shared_between_sft_and_rm_files_are_found(tmp_path):
    from align.convert import main

    files = []
    for name in ("oaast_rm_zh", "oaast_sft_zh"):
        real(f"oasst-zh/{name}.json")
        files.append(str(tmp_path / f"{name}.jsonl"))
        assert main([str(ROOT / "oasst-zh" / f"{name}.json"), "--output", files[-1]]) == 0
    code, text = validate(files)
    assert code == 0 and "325 of its 447 prompts are also in" in text


def test_pandalm_shares_its_tasks_with_self_instruct():
    tasks = {prompt_key(row.prompt) for row in parsed(real("self-instruct/user_oriented_instructions.jsonl"))}
    judged = {prompt_key(row.prompt) for row in parsed(real("pandalm/testset-v1.json"))}
    assert judged <= tasks


def test_no_prompt_of_any_file_is_in_both_splits():
    shares = {"train": 0.8, "validation": 0.2}
    home: dict[str, set[str]] = {}
    for name in ("oasst-zh/oaast_rm_zh.json", "oasst-zh/oaast_sft_zh.json", "oasst-en/en_100_tree.jsonl"):
        for record in parsed(real(name)):
            opening = record.prompt if isinstance(record.prompt, str) else record.prompt[0]["content"]
            home.setdefault(prompt_key(opening), set()).add(split_of(record.prompt, shares))
    assert len(home) > 500 and all(len(splits) == 1 for splits in home.values())


def test_cmrc_offsets_that_do_not_fit():
    conversion = real("cmrc2018-zh/cmrc2018_dev.json", to="demonstration")
    assert conversion.units == 3219 and conversion.problems == []
    wrong = [int(note.what.split()[0]) for note in conversion.notes if note.kind == "bad_offset"]
    assert sum(wrong) == 200


def test_squality_reviews_join_their_stories():
    conversion = real("squality/human-eval-all-responses.jsonl", "squality/v1-3-txt-test.jsonl", to="ranking")
    records = list(parsed(conversion))
    assert len(records) == 300 and {len(record.completions) for record in records} == {3}
    assert Counter(problem.kind for problem in conversion.problems) == {"no_partner": 32}
    best = [record.completions[record.ranks.index(min(record.ranks))] for record in records]
    human = {r.completion for r in parsed(real("squality/v1-3-txt-test.jsonl"))}
    human = {" ".join(text.split()) for text in human}
    assert sum(" ".join(text.split()) in human for text in best) == 294


def test_safetybench_answers_join_their_questions():
    conversion = real("safetybench-zh/test_zh_subset.json", "safetybench-zh/test_answers_zh_subset.json")
    assert conversion.units == 4200 and conversion.problems == []
    assert all("answer" in row.row for row in conversion.rows)


def test_tables_with_a_byte_order_mark_have_clean_columns():
    for name, column in (("truthfulqa/TruthfulQA.csv", "Type"), ("cbbq-zh/disease-ambiguous.csv", "example_id")):
        real(name)
        _, first = next(read_records(str(ROOT / name)))
        assert next(iter(first)) == column
    answers = Counter(row.row["answer"] for row in real("cbbq-zh/disease-disambiguous.csv").rows)
    assert answers == {"A": 287, "B": 299}


def test_labels_and_answers_are_those_that_the_documentation_counts():
    for name, column, counts in (
        ("cbbq-zh/disease-ambiguous.csv", "answer", {"C": 586}),  # "not known", whose place never changes
        ("cold-zh/test.csv", "label", {"0": 3216, "1": 2107}),
        ("xstest/xstest_prompts.csv", "label", {"safe": 250, "unsafe": 200}),
    ):
        assert Counter(row.row[column] for row in real(name).rows) == counts
    parsed_choices = [row.row for row in real("halluqa/HalluQA_mc.json").rows]  # they stand in the question's text
    assert len(parsed_choices) == 450 and all(row["answer"] in "ABCDE" and row["choices"] for row in parsed_choices)


def test_prose_loses_white_space_alone():
    conversion = real("ptx-en-shakespeare/input.txt")
    text = (ROOT / "ptx-en-shakespeare" / "input.txt").read_text(encoding="utf-8")
    assert "".join("".join(row.row["text"] for row in conversion.rows).split()) == "".join(text.split())
    assert max(len(row.row["text"]) for row in conversion.rows) <= 2000


def test_evaluation_sets_are_marked():
    for name in (
        "truthfulqa/TruthfulQA.csv",
        "gsm8k/test.jsonl",
        "xstest/xstest_prompts.csv",
        "humaneval/HumanEval.jsonl.gz",
    ):
        assert all(row.row["eval_only"] is True for row in real(name).rows)
    assert not any("eval_only" in row.row for row in real("mt-bench/mt_bench_question.jsonl").rows)
