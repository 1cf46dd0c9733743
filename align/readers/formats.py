"""The table of public formats: how a row of each is known, and who reads it."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from align.data import answer_columns, label_of
from align.readers import annotation, benchmarks, chat, choices, comparisons, pairs, pairwise, passages, ranked
from align.readers.base import Reader, number

# field -> kind; the first that a row has decides
OURS = dict.fromkeys(("completions", "chosen", "rejected"), "ranking")
OURS |= dict.fromkeys(("messages", "completion"), "demonstration")
OURS |= {"prompt": "prompt", "text": "text", "choices": "choice"}  # beside a prompt, choices may be a column


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
    answers = next((row[name] for name in ranked.SCORED if row.get(name)), None)
    if not isinstance(answers, list) or not answers:
        return False
    objects = all(isinstance(one, Mapping) and "rank" not in one for one in answers)
    beside = any(isinstance(row.get(name), list) for name in ranked.SCORE_LISTS)
    scored = objects and any(name in answers[0] for name in ranked.SCORES)
    return scored or (beside and not row.get("answers"))  # references of a question, with whatever numbers


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
    return _has("prompt", "completion")(row) and label_of(row) is not None


def _is_answered(row: Any) -> bool:
    """A question and one answer (`chat.ANSWERED`), with no other answer, and no number that may rate a `response`."""
    pair = chat.answered_by(row) if isinstance(row, Mapping) else None
    if pair is None:
        return False
    rated = any(isinstance(value, (int, float)) for name, value in row.items() if "id" not in str(name).lower())
    named = any(row.get(name) is not None for name in OURS if name not in pair)
    return not (rated and "response" in pair) and not named and not set(answer_columns(row)) - set(pair)


def _is_talk(row: Any) -> bool:
    """ShareGPT's `conversations`; LMSYS's and Capybara's `conversation`, UltraChat's `data`, as lists of turns."""
    if not isinstance(row, Mapping) or row.get("chosen") is not None:
        return False
    said = next((row[name] for name in chat.TALKS[1:] if isinstance(row.get(name), (list, tuple)) and row[name]), None)
    turns = said is not None and all(isinstance(turn, str) for turn in said)
    return row.get("conversations") is not None or turns or (said is not None and row.get("conversation") is said)


def _is_rated(row: Any) -> bool:
    """HelpSteer2's ratings, an answer a row."""
    return _has("prompt", "response", "helpfulness")(row) and number(row["helpfulness"]) is not None


def _is_halluqa_mc(row: Any) -> bool:
    return _has("question_id", "question", "answer")(row) and bool(benchmarks.MC.search(str(row["question"])))


def _is_winogender(row: Any) -> bool:
    """Its sentences, or the templates that they are made of; not any table with a column `sentence`."""
    return _has("sentid", "sentence")(row) or _has("occupation(0)", "sentence")(row)


def _prompts(reader: Reader, matches: Callable[[Any], bool], choices: Reader | None = None) -> Format:
    return Format(matches, {"prompt": reader} | ({"choice": choices} if choices else {}))


def _is_mmlu(row: Any) -> bool:
    whole = _has("question", "choices", "answer")(row) and isinstance(row["choices"], (list, tuple))
    return whole and not _is_ours(row)


def _is_arc(row: Any) -> bool:
    return _has("question", "choices", "answerKey")(row) and isinstance(row["choices"], Mapping) and not _is_ours(row)


def _is_ours(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) is not None for name in OURS if name != "choices")


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
    "shp": Format(_has("history", "human_ref_A", "human_ref_B", "labels"), {"ranking": comparisons.shp_pairs}),
    "webgpt": Format(_has("question", "answer_0", "answer_1", "score_0"), {"ranking": comparisons.webgpt_pairs}),
    "arena": Format(_has("conversation_a", "conversation_b", "winner"), {"ranking": comparisons.arena_pairs}),
    "arena_texts": Format(
        _has("prompt", "response_a", "response_b", "winner_tie"), {"ranking": comparisons.arena_texts}
    ),
    "alpaca_farm": Format(
        _has("instruction", "output_1", "output_2", "preference"), {"ranking": comparisons.farm_pairs}
    ),
    "unified_feedback": Format(_has("conv_A", "conv_B", "conv_A_rating"), {"ranking": comparisons.unified_pairs}),
    "ratings": Format(_is_rated, {"ranking": comparisons.rated_answers}),
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
    "named_pairs": Format(pairs.is_named_pair, {"ranking": pairs.named_pairs}),
    "sharegpt": Format(_is_talk, {"demonstration": chat.sharegpt_rows}),
    "mmlu": Format(_is_mmlu, {"choice": choices.mmlu}),
    "arc": Format(_is_arc, {"choice": choices.arc}),
    "hellaswag": Format(_has("ctx", "endings", "label"), {"choice": choices.hellaswag}),
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
    "truthfulqa_mc": _prompts(benchmarks.truthfulqa_mc, _has("question", "mc1_targets"), choices.truthfulqa_mc),
    "halluqa": _prompts(benchmarks.halluqa, _has("Question", "Best Answer1")),
    "halluqa_mc": _prompts(benchmarks.halluqa_mc, _is_halluqa_mc, choices.halluqa_mc),
    "gsm8k": _prompts(benchmarks.gsm8k, lambda row: _has("question", "answer")(row) and "####" in str(row["answer"])),
    "bbq": _prompts(benchmarks.bbq, _has("context", "question", "ans0", "ans1", "ans2"), choices.bbq),
    "crows_pairs": _prompts(benchmarks.crows_pairs, _has("sent_more", "sent_less"), choices.crows_pairs),
    "winogender": _prompts(benchmarks.sentence, _is_winogender, choices.winogender),
    "winogender_statistics": _prompts(benchmarks.no_text, _has("occupation", "bls_pct_female")),
    "cold": _prompts(benchmarks.cold, _has("TEXT", "fine-grained-label")),
    "safetybench": Format(
        _has("id", "options", "question"),
        {"prompt": benchmarks.safetybench, "choice": choices.safetybench},
        partner="safetybench_answers",
    ),
    "safetybench_answers": _prompts(benchmarks.safetybench, _is_answers),
    "xstest": Format(_has("prompt", "focus", "type"), {"prompt": benchmarks.asked}, foreign=False),
    "humaneval": Format(_has("prompt", "canonical_solution"), {"prompt": benchmarks.asked}, foreign=False),
    "ifeval": Format(_has("prompt", "instruction_id_list"), {"prompt": benchmarks.asked}, foreign=False),
    "trl": Format(lambda row: our_kind([row]) is not None, {}, foreign=False),
    "strings": _prompts(chat.strings, lambda row: isinstance(row, str)),
    "prose": Format(lambda row: False, {"text": passages.prose}),  # known by .txt
}


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
