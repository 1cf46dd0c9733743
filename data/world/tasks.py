"""The families of tasks in one table: their use case, wordings, constraints, and what of skills.py they use.

A task is a flat dict of strings (`family` and the family's slots), so that JSON tools give every row the same columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from data.world import lexicon as lx
from data.world import skills
from data.world.grammar import Reply


@dataclass(frozen=True)
class Family:
    """A kind of task. `fields` turns slots into the words of a wording; `constraints` names what it may carry."""

    name: str
    use_case: str
    wordings: dict[str, tuple[str, ...]]
    draw: Callable[[Random], skills.Slots]
    ideal: Callable[[Random, skills.Slots, str, bool], str]
    check: Callable[[skills.Slots, Reply], skills.Check]
    fields: Callable[[skills.Slots, str], skills.Slots] = lambda slots, language: slots
    constraints: tuple[str, ...] = ("sure", "thanks")


ALL_CONSTRAINTS = ("capitals", "sure", "thanks")
STORY_CONSTRAINTS = ("sure", "thanks", "short", "short")


NOTE_WORDINGS = {
    "en": (
        "write a thank you note to {name} for the {noun} .",
        "thank {name} for {a_noun} in a note .",
        "note to {name} : thanks for the {noun} .",
        "write to {name} about the gift , {a_noun} .",
    ),
    "zh": ("给{name}写感谢信，礼物：{noun}。", "感谢{name}送的“{noun}”，写一句话。", "感谢信：{name}，{noun}。"),
}
AD_WORDINGS = {
    "en": (
        "write an ad for {a_noun} .",
        "i sell {a_noun} . write a line for my shop .",
        "make an ad line : {noun} .",
        "ad for my {noun} .",
    )
}


def _generation() -> list[Family]:
    return [
        Family(
            "story",
            "generation",
            skills.STORY_WORDINGS,
            skills.draw_story(1),
            skills.story_ideal,
            skills.check_story,
            skills.story_fields,
            STORY_CONSTRAINTS,
        ),
        Family(
            "story_two",
            "generation",
            skills.STORY_WORDINGS,
            skills.draw_story(2),
            skills.story_ideal,
            skills.check_story,
            skills.story_fields,
            STORY_CONSTRAINTS,
        ),
        Family(
            "note",
            "generation",
            NOTE_WORDINGS,
            skills.draw_note,
            skills.note_ideal,
            skills.check_form(skills.NOTE, skills.ZH_NOTE, ("name", "noun"), 8),
            skills.zh_fields,
        ),
        Family(
            "ad",
            "generation",
            AD_WORDINGS,
            skills.draw_ad,
            skills.ad_ideal,
            skills.check_form(skills.AD, None, ("noun",), 8),
            skills.zh_fields,
            STORY_CONSTRAINTS,
        ),
    ]


def _open_qa() -> list[Family]:
    return [
        Family(
            kind,
            "open_qa",
            skills.FACT_WORDINGS[kind],
            skills.draw_fact(kind),
            skills.fact_ideal(kind),
            skills.check_fact(kind),
            skills.fact_fields(kind),
            ALL_CONSTRAINTS,
        )
        for kind in skills.FACT_TABLES
    ]


def _sensitive() -> list[Family]:
    harm = [
        Family(
            f"harm_{use_case}",
            use_case,
            wordings,
            skills.draw_harm,
            skills.refusal,
            skills.check_harm,
            skills.harm_fields,
            (),
        )
        for use_case, wordings in skills.HARM_WORDINGS.items()
    ]
    tips = [
        Family(
            f"tip_{use_case}", use_case, wordings, skills.draw_tip, skills.tip_ideal, skills.check_tip, constraints=()
        )
        for use_case, wordings in skills.TIP_WORDINGS.items()
    ]
    return harm + tips


def _brainstorming() -> list[Family]:
    return [
        Family(
            "list",
            "brainstorming",
            skills.LIST_WORDINGS,
            skills.draw_list,
            skills.list_ideal,
            skills.check_list,
            skills.list_fields,
            ALL_CONSTRAINTS,
        )
    ]


GREET_WORDINGS = {
    "en": (
        "hello , i am {name} and i like the {noun} .",
        "hi , my name is {name} . i have {a_noun} .",
        "good day , {name} here , with my {noun} .",
        "i am {name} , i came by to see the {noun} .",
    ),
    "zh": ("你好，我是{name}，我喜欢{noun}。", "我叫{name}，我有{noun}。", "我是{name}，来看{noun}。"),
}
THANKS_WORDINGS = {
    "en": (
        "thank you for the {noun} , says {name} .",
        "{name} and i thank you for {a_noun} .",
        "many thanks for the {noun} . {name} .",
        "you gave me {a_noun} . thank you !",
    )
}
BYE_WORDINGS = {
    "en": (
        "good bye , i go to the {place} with {name} .",
        "i must leave for the {place} . {name} waits .",
        "see you later , {name} is at the {place} .",
        "bye now ! off to the {place} .",
    )
}


def _chat() -> list[Family]:
    return [
        Family(
            "greet",
            "chat",
            GREET_WORDINGS,
            skills.draw_note,
            skills.greet_ideal,
            skills.check_greet,
            skills.zh_fields,
            (),
        ),
        Family(
            "thanks",
            "chat",
            THANKS_WORDINGS,
            skills.draw_note,
            skills.fixed("you are welcome ."),
            skills.check_words(("you are welcome", "you are very welcome"), ("welcome",), 4),
            skills.zh_fields,
            (),
        ),
        Family(
            "bye",
            "chat",
            BYE_WORDINGS,
            skills.draw_visit,
            skills.fixed("good bye , see you soon ."),
            skills.check_words(("good bye , see you soon", "see you soon", "good bye"), ("bye",), 5),
            constraints=(),
        ),
    ]


def _rewrite_and_summary() -> list[Family]:
    opposite = {
        "en": (
            "what is the opposite of {adjective} ?",
            "opposite of {adjective} ?",
            "turn {adjective} into its opposite .",
            "{adjective} : give the opposite .",
        )
    }
    phrase = {
        "en": (
            "make it opposite : {phrase} .",
            "write the opposite of this : {phrase} .",
            "opposite : {phrase} .",
            "rewrite with the opposite word : {phrase} .",
        )
    }
    summary = {
        "en": ("sum up : {text}", "say it in one sentence : {text}", "make it short : {text}", "{text} sum this up .")
    }
    return [
        Family(
            "opposite",
            "rewrite",
            opposite,
            skills.draw_opposite,
            lambda rng, slots, language, brief: lx.OPPOSITE[slots["adjective"]],
            skills.check_opposite,
            constraints=(),
        ),
        Family(
            "opposite_phrase",
            "rewrite",
            phrase,
            skills.draw_phrase,
            skills.phrase_ideal,
            skills.check_phrase,
            skills.phrase_fields,
        ),
        Family(
            "summary",
            "summarization",
            summary,
            skills.draw_scene,
            skills.summary_ideal,
            skills.check_summary,
            skills.summary_fields,
        ),
    ]


CLOSED_WORDINGS = {"en": ("{text} {question}", "read : {text} {question}", "text : {text} question : {question}")}
EXTRACT_WORDINGS = {
    "en": (
        "find the {what} : {text}",
        "{text} give only the {what} .",
        "{what} in this text ? {text}",
        "take out the {what} : {text}",
    )
}
REVIEW_WORDINGS = {
    "en": (
        "positive or negative : {text} .",
        "review : {text} . positive or negative ?",
        "{text} . is that positive or negative ?",
    ),
    "zh": ("评论：{text}。好评还是差评？", "{text}。这是好评还是差评？", "好评还是差评：{text}。"),
}
KIND_WORDINGS = {
    "en": (
        "what kind of thing is {a_noun} ?",
        "name the class of the word {noun} .",
        "{noun} : which kind ?",
        "which group has the {noun} in it ?",
    )
}


def _reading() -> list[Family]:
    return [
        Family(
            "closed",
            "closed_qa",
            CLOSED_WORDINGS,
            skills.draw_closed,
            skills.asked_ideal,
            skills.check_asked,
            skills.closed_fields,
        ),
        Family(
            "extract",
            "extract",
            EXTRACT_WORDINGS,
            skills.draw_extract,
            skills.asked_ideal,
            skills.check_asked,
            skills.extract_fields,
        ),
        Family(
            "review",
            "classification",
            REVIEW_WORDINGS,
            skills.draw_review,
            skills.review_ideal,
            skills.check_review,
            skills.review_fields,
            ALL_CONSTRAINTS,
        ),
        Family(
            "kind",
            "classification",
            KIND_WORDINGS,
            skills.draw_kind,
            skills.kind_ideal,
            skills.check_kind,
            skills.zh_fields,
            ALL_CONSTRAINTS,
        ),
    ]


def _other() -> list[Family]:
    repeat = {
        "en": (
            "say {word} twice .",
            "write the word {word} two times .",
            "repeat twice : {word} .",
            "two times {word} .",
        )
    }
    return [
        Family("repeat", "other", repeat, skills.draw_repeat, skills.repeat_ideal, skills.check_repeat, constraints=()),
    ]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *_generation(),
        *_open_qa(),
        *_sensitive(),
        *_brainstorming(),
        *_chat(),
        *_rewrite_and_summary(),
        *_reading(),
        *_other(),
    )
}


def ideal(task: skills.Slots, language: str, constraint: str | None, rng: Random) -> str:
    """A reply that deserves 7: right, short, and as the constraint asks."""
    text = FAMILIES[task["family"]].ideal(rng, task, language, constraint == "short")
    return constrain(text, language, constraint)


def constrain(text: str, language: str, constraint: str | None) -> str:
    """The same reply in the form that the constraint asks for."""
    if constraint == "capitals":
        return text.upper()
    if constraint == "sure":
        return f"好的，{text}" if language == "zh" else f"sure , {text}"
    if constraint == "thanks":
        return f"{text.rstrip('。！')}。谢谢" if language == "zh" else f"{text.rstrip(' .!')} . thanks"
    return text
