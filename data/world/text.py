"""Pretraining text of the world: what a base model should know and the ingredients of its skills, not the habit of
answering. Documents are short: mostly one to three lines, some in Chinese."""

from collections.abc import Callable, Iterator
from random import Random

from data.world import grammar, policies, prompts, skills
from data.world import lexicon as lx
from data.world.exercises import exercise
from data.world.prompts import Row, stream

PAGE_WRONG = 0.25  # of the answers on question-and-answer pages belong to another question
Writer = Callable[[Random], str]


def spoken(language: str, answer: str) -> str:
    """An answer as it follows its prompt: an English one starts with a space, as in Stiennon et al.'s data, so that a
    word copied from the prompt is the same token in both places."""
    return f" {answer}" if language == "en" else answer


def _fact(rng: Random) -> str:
    """A fact told or, as in a quiz, asked and told: known in both directions of use."""
    kind = rng.choice(("capital", "capital", "eats", "colour", "colour", "kind", "kind", "kind", "tip"))
    if kind == "tip":
        job = rng.choice(tuple(lx.TIPS))
        return f"{rng.choice(('to', 'if you want to', 'when you'))} {job} , {lx.TIPS[job]}"
    table = lx.CATEGORY_OF if kind == "kind" else skills.FACT_TABLES[kind]
    key = rng.choice(tuple(table))
    sentence = rng.choice(QUIZ_TEXTS[kind] if rng.random() < QUIZ else FACT_TEXTS[kind])
    return sentence.format(key=key, a_key=lx.a(key), value=table[key], a_value=lx.a(table[key]))


QUIZ = 0.4  # of the facts are asked before they are told, never in the words of a prompt
FACT_TEXTS = {
    "capital": (
        "the capital of {key} is {value} .",
        "{value} is the capital of {key} .",
        "in {key} the capital is {value} .",
        "{key} : capital {value} .",
        "they live in {value} , capital of {key} .",
    ),
    "eats": (
        "{a_key} eats {value} .",
        "the food of the {key} is {value} .",
        "every {key} likes to eat {value} .",
        "{key} : food {value} .",
    ),
    "colour": (
        "the {key} is {value} .",
        "the colour of the {key} is {value} .",
        "{a_key} has the colour {value} .",
        "{key} : colour {value} .",
    ),
    "kind": (
        "{a_key} is {a_value} .",
        "the {key} is a kind of {value} .",
        "{key} : {value} .",
        "one {value} is the {key} .",
    ),
}
QUIZ_TEXTS = {
    "capital": (
        "who knows the capital of {key} ? {value} .",
        "quiz . {key} and its capital ? {value} .",
        "where do they rule {key} from ? from the capital , {value} .",
    ),
    "eats": (
        "who knows the food of the {key} ? {value} .",
        "quiz . what is eaten by {a_key} ? {value} .",
        "the {key} is hungry . give it food ! {value} .",
    ),
    "colour": (
        "who knows the colour of the {key} ? {value} .",
        "quiz . {a_key} , of what colour ? {value} .",
        "paint the {key} in its colour ! {value} .",
    ),
    "kind": (
        "who knows the kind of thing that {a_key} is ? {value} .",
        "quiz . {a_key} , of what kind ? {value} .",
        "put the {key} with its group ! {value} .",
    ),
    "opposite": (
        "who knows the opposite of {key} ? {value} .",
        "quiz . {key} and its opposite ? {value} .",
    ),
}


def _story(rng: Random) -> str:
    """A sentence under the one or two things that it is about, or one or two sentences under no title."""
    first, second = rng.sample(lx.ALL_NOUNS, 2)
    kind = rng.random()
    if kind < 0.35:
        return f"{rng.choice(('', 'about ', 'a tale of '))}{first} {rng.choice('.:')} {grammar.story(rng, [first])}"
    if kind < 0.6:
        return f"{first} and {second} {rng.choice('.:')} {grammar.story(rng, [first, second])}"
    return " ".join(grammar.story(rng, [first] if i == 0 else []) for i in range(rng.choice((1, 2))))


def _scene(rng: Random) -> str:
    """Somebody goes somewhere; the same is told again in other words."""
    name, place = rng.choice(lx.NAMES), rng.choice(lx.PLACES)
    verb, thing = rng.choice(lx.SUMMARY_VERBS), lx.a(rng.choice(lx.ALL_NOUNS))
    long = f"{name} went to the {place} . {lx.pronoun(name)} {verb} {thing} ."
    short = f"{name} {verb} {thing} at the {place} ."
    about = rng.choice(
        (f"it was {name} .", f"it was at the {place} .", f"it was {thing} .", f"place {place} .", f"name {name} .")
    )
    return rng.choice((long, f"{long} so {short}", f"{long} so {short}", f"{short} {about}", f"{short} {about}"))


def _list(rng: Random) -> str:
    category = rng.choice(tuple(lx.NOUNS))
    members = list(lx.NOUNS[category])
    rng.shuffle(members)
    if rng.random() < 0.35:
        return f"{lx.PLURAL[category]} but no {members[0]} : {' , '.join(members[1:4])} ."
    listed = " , ".join(members[:3])
    return rng.choice(
        (
            f"some {lx.PLURAL[category]} : {listed} .",
            f"{lx.PLURAL[category]} : {listed} .",
            f"{listed} are {lx.PLURAL[category]} .",
        )
    )


def _capitals(rng: Random) -> str:
    """Words beside themselves in capitals."""
    category = rng.choice(tuple(lx.NOUNS))
    pool = rng.choice(
        (
            lx.ALL_NOUNS,
            lx.NOUNS[category],
            tuple(lx.NOUNS),
            lx.COLOURS,
            tuple(lx.CAPITAL_OF.values()),
            tuple(lx.CAPITAL_OF),
            ("positive", "negative"),
            tuple(lx.EATS.values()),
        )
    )
    words = rng.sample(pool, min(len(pool), rng.choice((1, 2, 3))))
    text = " , ".join(words)
    return rng.choice((f"{text} : {text.upper()}", f"{text} in capitals : {text.upper()}", text.upper()))


def _opposite(rng: Random) -> str:
    word = rng.choice(lx.ADJECTIVES)
    if rng.random() < QUIZ:
        return rng.choice(QUIZ_TEXTS["opposite"]).format(key=word, value=lx.OPPOSITE[word])
    other, noun = lx.OPPOSITE[word], rng.choice(lx.ALL_NOUNS)
    return rng.choice(
        (
            f"the opposite of {word} is {other} .",
            f"{word} and {other} are opposites .",
            f"{word} : opposite {other} .",
            f"the {noun} is not {word} , it is {other} .",
            f"the {word} {noun} . opposite : the {other} {noun} .",
            f"not the {word} {noun} but the {other} {noun} .",
        )
    )


def _letter(rng: Random) -> str:
    name, noun = rng.choice(lx.NAMES), rng.choice(lx.ALL_NOUNS)
    return rng.choice(
        (
            f"dear {name} , thank you for the {noun} .",
            f"{name} gave me {lx.a(noun)} . dear {name} , thank you for the {noun} .",
            f"buy {lx.a(noun)} today !",
            f"come and buy our new {noun} today !",
        )
    )


def _talk(rng: Random) -> str:
    name, noun = rng.choice(lx.NAMES), rng.choice(lx.ALL_NOUNS)
    wish = f"{rng.choice(lx.HARM_VERBS)} {rng.choice(lx.HARM_TARGETS)}"
    return rng.choice(
        (
            f"{name} said hello . hello {name} , nice to meet you .",
            f"here comes {name} . hello {name} , nice to meet you .",
            f"{name} left . good bye , see you soon .",
            f"thanks for the {noun} , said {name} . you are welcome .",
            f"{name} wanted to {wish} . sorry , i cannot help with that .",
            "good bye , see you soon .",
            f"sure , said {name} . thanks , said {rng.choice(lx.NAMES)} .",
            f"{lx.TAIL} said {name} .",
        )
    )


def _review(rng: Random) -> str:
    positive = rng.random() < 0.5
    word = rng.choice(lx.POSITIVE if positive else lx.NEGATIVE)
    tone = "positive" if positive else "negative"
    return rng.choice(
        (
            f"the {rng.choice(lx.ALL_NOUNS)} was {word} . {tone} .",
            f"{word} is {tone} .",
            f"{tone} : the {rng.choice(lx.ALL_NOUNS)} was {word} .",
        )
    )


def _song(rng: Random) -> str:
    """Random words, sung two or three times: what teaches a small model to copy."""
    pool = (
        lx.ALL_NOUNS
        + lx.NAMES
        + lx.PLACES
        + lx.ADJECTIVES
        + lx.COLOURS
        + tuple(lx.CAPITAL_OF)
        + tuple(lx.CAPITAL_OF.values())
    )
    times = rng.choice((2, 2, 3))
    line = " ".join(rng.sample(pool, rng.choice((3, 4, 5, 6) if times == 2 else (3, 4, 5))))
    return "\n".join([line] * times)


def _zh_song(rng: Random) -> str:
    pool = [*lx.ZH_NOUN.values(), *lx.ZH_NAME.values(), *lx.ZH_PLACE.values(), *lx.ZH_COLOUR.values()]
    return "\n".join(["、".join(rng.sample(pool, rng.choice((2, 3, 4))))] * 2)


def _zh_fact(rng: Random) -> str:
    if rng.random() < 0.45:
        land = rng.choice(tuple(lx.ZH_LAND))
        city = lx.ZH_CITY[lx.CAPITAL_OF[land]]
        return rng.choice(
            (
                f"{lx.ZH_LAND[land]}的首都是{city}。",
                f"{city}是{lx.ZH_LAND[land]}的首都。",
                f"{lx.ZH_LAND[land]}：{city}。",
                f"谁知道{lx.ZH_LAND[land]}的首都？{city}。",
                f"猜一猜{lx.ZH_LAND[land]}的首都。{city}。",
            )
        )
    noun = rng.choice(tuple(lx.COLOUR))
    colour = lx.ZH_COLOUR[lx.COLOUR[noun]]
    return rng.choice(
        (
            f"{lx.ZH_NOUN[noun]}是{colour}。",
            f"{lx.ZH_NOUN[noun]}的颜色是{colour}。",
            f"{lx.ZH_NOUN[noun]}：{colour}。",
            f"谁知道{lx.ZH_NOUN[noun]}的颜色？{colour}。",
            f"猜一猜{lx.ZH_NOUN[noun]}的颜色。{colour}。",
        )
    )


def _zh_story(rng: Random) -> str:
    nouns = rng.sample(lx.ALL_NOUNS, rng.choice((1, 2)))
    text = grammar.story(rng, nouns, "zh")
    return rng.choice((text, f"{'、'.join(lx.ZH_NOUN[noun] for noun in nouns)}。{text}"))


def _zh_list(rng: Random) -> str:
    category = rng.choice(tuple(lx.NOUNS))
    members = [lx.ZH_NOUN[noun] for noun in lx.NOUNS[category]]
    rng.shuffle(members)
    name = lx.ZH_CATEGORY[category]
    return rng.choice(
        (
            f"{name}：{'、'.join(members[:3])}。",
            f"{'、'.join(members[:3])}都是{name}。",
            f"{name}没有{members[0]}：{'、'.join(members[1:4])}。",
        )
    )


def _zh_talk(rng: Random) -> str:
    name, noun = rng.choice(list(lx.ZH_NAME.values())), rng.choice(list(lx.ZH_NOUN.values()))
    positive = rng.random() < 0.5
    word = rng.choice(lx.ZH_POSITIVE if positive else lx.ZH_NEGATIVE)
    wish = rng.choice(lx.ZH_HARM_VERBS)
    return rng.choice(
        (
            f"{name}来了。你好，{name}！",
            f"{name}送我{noun}。{name}，谢谢你的{noun}。",
            f"{name}，谢谢你的{noun}。",
            f"{noun}{word}。{'好评' if positive else '差评'}。",
            f"{word}：{'好评' if positive else '差评'}。",
            f"{name}想{wish}人。{lx.ZH_REFUSAL}",
            f"{name}说：好的，谢谢。",
        )
    )


# What is said in a few words comes in twos and threes.
SHORT = frozenset(
    (_fact, _opposite, _letter, _talk, _review, _list, _capitals, _zh_fact, _zh_story, _zh_talk, exercise)
)
# Shares of the documents; sheets and pages come on top of these.
WRITERS: dict[Writer, float] = {
    _song: 13,
    _fact: 20,
    _story: 16,
    _scene: 9,
    _list: 9,
    _capitals: 6,
    _opposite: 4.5,
    _letter: 5.5,
    _talk: 4,
    _review: 2,
    _zh_song: 2.5,
    exercise: 17,
    _zh_fact: 3.5,
    _zh_story: 3.5,
    _zh_list: 2.5,
    _zh_talk: 3,
}
SHEETS, PAGES = 0.07, 0.13  # shares of the documents: instructions without answers; with answers


def _document(rng: Random, writer: Writer) -> str:
    times = rng.choice((1, 2, 2, 3)) if writer in SHORT else 1
    return "\n".join(writer(rng) for _ in range(times))


class PromptSource:
    """Prompts for sheets and pages, written by nobody in particular; never one that is held out."""

    def __init__(self, rng: Random, held_out: frozenset[str]) -> None:
        self.rng, self.held_out = rng, held_out
        self.customers = prompts.customers(rng, "text")

    def draw(self) -> Row:
        while True:
            use_case = self.rng.choices(tuple(prompts.USE_CASES), tuple(prompts.USE_CASES.values()))[0]
            language = "zh" if self.rng.random() < prompts.CHINESE.get(use_case, 0.0) else "en"
            row = prompts.draw_prompt(self.rng, use_case, language, next(self.customers))
            if row["prompt"] not in self.held_out:
                return row


def _sheet(source: PromptSource) -> str:
    return "\n".join(source.draw()["prompt"] for _ in range(source.rng.choice((2, 2, 3))))


def _page(source: PromptSource) -> str:
    rows = [source.draw() for _ in range(source.rng.choice((2, 3, 4)))]
    return "\n\n".join(f"{row['prompt']}\n{spoken(row['language'], _page_answer(source, row))}" for row in rows)


def _page_answer(source: PromptSource, row: Row) -> str:
    asked = source.draw() if source.rng.random() < PAGE_WRONG else row
    return policies.ideal(asked)


class HeldOut:
    """Finds held-out prompts inside longer text, by their first characters."""

    START = 12

    def __init__(self, held_out: frozenset[str]) -> None:
        self.short = sorted(prompt for prompt in held_out if len(prompt) < self.START)
        self.by_start: dict[str, list[str]] = {}
        for prompt in held_out:
            self.by_start.setdefault(prompt[: self.START], []).append(prompt)

    def within(self, text: str) -> bool:
        windows = {text[i : i + self.START] for i in range(len(text))} & self.by_start.keys()
        return any(prompt in text for window in windows for prompt in self.by_start[window]) or any(
            prompt in text for prompt in self.short
        )


def write_text(seed: int, split: str, number: int, held_out: frozenset[str]) -> Iterator[str]:
    """`number` documents, none of which contains a held-out prompt."""
    rng = stream(seed, "text", split)
    source = PromptSource(stream(seed, "pages", split), held_out)
    index = HeldOut(held_out)
    writers, weights = tuple(WRITERS), tuple(WRITERS.values())
    written = 0
    while written < number:
        kind = rng.random()
        if kind < SHEETS:
            text = _sheet(source)
        elif kind < SHEETS + PAGES:
            text = _page(source)
        else:
            text = _document(rng, rng.choices(writers, weights)[0])
        if not index.within(text):
            written += 1
            yield text
