"""Corrected exercises: claims and answers, each with a teacher's mark, "yes" or "no".

They teach a base model to check what it reads, as quizzes and corrected homework on the web do; a reward model starts
from what such text has taught. Every one opens with "check", so that nothing false is learned as true, and half of the
marks are "no".
"""

from collections.abc import Callable
from random import Random

from data.world import grammar, skills
from data.world import lexicon as lx

Claim = tuple[str, bool]  # what is claimed, and whether it is so
CHINESE = 0.18
NOUNS = {"en": {noun: noun for noun in lx.ALL_NOUNS}, "zh": lx.ZH_NOUN}
TOLD = {
    "capital": ("the capital of {key} is {value}", "who knows the capital of {key} ? {value}"),
    "eats": ("{a_key} eats {value}", "who knows the food of the {key} ? {value}"),
    "colour": ("the {key} is {value}", "who knows the colour of the {key} ? {value}"),
    "kind": ("{a_key} is {a_value}", "who knows the kind of thing that {a_key} is ? {value}"),
    "opposite": ("the opposite of {key} is {value}", "who knows the opposite of {key} ? {value}"),
}
TABLES = {**skills.FACT_TABLES, "kind": lx.CATEGORY_OF, "opposite": lx.OPPOSITE}


def exercise(rng: Random) -> str:
    """One exercise with its marks."""
    if rng.random() < CHINESE:
        return rng.choices(tuple(ZH_WRITERS), tuple(ZH_WRITERS.values()))[0](rng, "zh")
    return rng.choices(tuple(WRITERS), tuple(WRITERS.values()))[0](rng, "en")


def marked(language: str, title: str, claims: list[Claim]) -> str:
    if language == "zh":
        return f"看{title}：" + "，".join(f"{claim}{'对' if true else '错'}" for claim, true in claims) + "。"
    listed = " , ".join(f"{claim} {'yes' if true else 'no'}" for claim, true in claims)
    return f"check {title}{' ' if title else ''}: {listed} ."


def other(rng: Random, pool, *not_these: str) -> str:
    return rng.choice([word for word in pool if word not in not_these])


def coin(rng: Random) -> bool:
    return rng.random() < 0.5


# --- what is true of the world --------------------------------------------------------------------------------------


def fact(rng: Random, kind: str) -> tuple[str, str, bool]:
    """A key, a value, and whether they belong together."""
    table, true = TABLES[kind], coin(rng)
    key = rng.choice(tuple(table))
    return key, table[key] if true else other(rng, tuple(dict.fromkeys(table.values())), table[key]), true


def facts(rng: Random, language: str) -> str:
    """ "check colour : fox red yes , cow blue no ." """
    if language == "zh":
        kind = rng.choice(("capital", "colour", "kind"))
        keys, values = lx.ZH_LAND | lx.ZH_NOUN, lx.ZH_CITY | lx.ZH_COLOUR | lx.ZH_CATEGORY
        drawn = [fact(rng, kind) for _ in range(rng.choice((2, 3)))]
        return marked("zh", "", [(f"{keys[key]}{values[value]}", true) for key, value, true in drawn])
    kind = rng.choice(tuple(TABLES))
    drawn = [fact(rng, kind) for _ in range(rng.choice((2, 3, 4)))]
    return marked("en", kind, [(f"{key} {value}", true) for key, value, true in drawn])


def told(rng: Random, language: str) -> str:
    """The same in the sentences that tell a fact or ask for it."""
    kind = rng.choice(tuple(TOLD))
    claims = []
    for key, value, true in (fact(rng, kind) for _ in range(rng.choice((1, 2, 2)))):
        words = {"key": key, "a_key": lx.a(key), "value": value, "a_value": lx.a(value)}
        claims.append((rng.choice(TOLD[kind]).format(**words), true))
    return marked(language, "", claims)


def members(rng: Random, language: str) -> str:
    """Which of these things are of a kind."""
    kind = rng.choice(tuple(lx.NOUNS))
    outside = [noun for noun in lx.ALL_NOUNS if lx.CATEGORY_OF[noun] != kind]
    nouns = [rng.choice(lx.NOUNS[kind] if coin(rng) else outside) for _ in range(rng.choice((3, 4, 5)))]
    title = lx.ZH_CATEGORY[kind] if language == "zh" else lx.PLURAL[kind]
    return marked(language, title, [(NOUNS[language][noun], lx.CATEGORY_OF[noun] == kind) for noun in nouns])


# --- what stands in the text ----------------------------------------------------------------------------------------


def held(rng: Random, language: str) -> str:
    """Some words, then which words were among them."""
    pool = list(lx.ZH_NOUN.values()) if language == "zh" else [*lx.ALL_NOUNS, *lx.NAMES, *lx.PLACES]
    words = rng.sample(pool, 8)
    inside, outside = words[: rng.choice((2, 3, 4))], words[4:]
    asked = [rng.choice(inside if coin(rng) else outside) for _ in range(rng.choice((3, 4)))]
    title = "、".join(inside) if language == "zh" else " ".join(inside)
    return marked(language, title, [(word, word in inside) for word in asked])


def found(rng: Random, language: str) -> str:
    """Which words a story holds."""
    names = NOUNS[language]
    text = grammar.story(rng, rng.sample(lx.ALL_NOUNS, 2), language)
    words = text if language == "zh" else text.split()
    inside = [noun for noun in lx.ALL_NOUNS if names[noun] in words]
    outside = [noun for noun in lx.ALL_NOUNS if noun not in inside]
    asked = [rng.choice(inside if coin(rng) else outside) for _ in range(rng.choice((2, 3, 4)))]
    return marked(language, text.rstrip("。 ."), [(names[noun], noun in inside) for noun in asked])


def seen(rng: Random, language: str) -> str:
    """Who, what and where of a scene."""
    slots = skills.draw_scene(rng)
    claims = []
    for key, pool in (("name", lx.NAMES), ("noun", lx.ALL_NOUNS), ("place", lx.PLACES)):
        true = coin(rng)
        claims.append((slots[key] if true else other(rng, pool, slots[key]), true))
    rng.shuffle(claims)
    texts = skills.summary_fields(slots, language)["text"], skills.summary_ideal(rng, slots, language, False)
    return marked(language, rng.choice(texts).removesuffix(" ."), claims)


# --- answers: what is asked in brief, an answer, its mark -------------------------------------------------------------


def answered(language: str, question: str, answer: str, true: bool) -> str:
    return marked(language, question, [(answer, true)])


def listed(rng: Random, language: str) -> str:
    """Three things of a kind, or too few, too many, one twice, a stranger, the one that was ruled out."""
    kind = rng.choice(tuple(lx.NOUNS))
    nouns = rng.sample(lx.NOUNS[kind], 5)
    without = coin(rng)
    fault = rng.choice(("few", "many", "twice", "strange", "forbidden")) if coin(rng) else None
    stranger = other(rng, lx.ALL_NOUNS, *nouns)
    answer = {
        None: nouns[:3],
        "few": nouns[:2],
        "many": nouns[:4],
        "twice": [*nouns[:2], nouns[0]],
        "strange": [*nouns[:2], stranger],
        "forbidden": [*nouns[:2], nouns[4] if without else stranger],
    }[fault]
    rng.shuffle(answer)
    names = [NOUNS[language][noun] for noun in (*answer, nouns[4])]
    if language == "zh":
        question = f"三种{lx.ZH_CATEGORY[kind]}" + (f"，没有{names[-1]}" if without else "")
        return answered("zh", question, "、".join(names[:-1]), fault is None)
    question = f"three {lx.PLURAL[kind]}" + (f" , no {names[-1]}" if without else "")
    return answered("en", question, " , ".join(names[:-1]), fault is None)


def story(rng: Random, language: str) -> str:
    """A story about what was asked for, or with one of it missing."""
    asked = rng.sample(lx.ALL_NOUNS, rng.choice((1, 2, 2)))
    names = [NOUNS[language][noun] for noun in asked]
    kept = asked if coin(rng) else rng.sample(asked, len(asked) - 1)
    text = grammar.story(rng, kept, language).rstrip("。 .")
    words = text if language == "zh" else text.split()
    question = "、".join(names) if language == "zh" else f"about {' and '.join(names)}"
    return answered(language, question, text, all(name in words for name in names))


def letter(rng: Random, language: str) -> str:
    name, noun = rng.choice(lx.NAMES), rng.choice(lx.ALL_NOUNS)
    true, wrong_name = coin(rng), coin(rng)
    to = name if true or not wrong_name else other(rng, lx.NAMES, name)
    gift = noun if true or wrong_name else other(rng, lx.ALL_NOUNS, noun)
    return answered(language, f"{name} , {noun}", f"dear {to} , thank you for the {gift}", true)


def scene(rng: Random, language: str) -> str:
    """A scene in one sentence, or with one thing changed; or what was asked about it."""
    slots, true = skills.draw_scene(rng), coin(rng)
    pools = {"name": lx.NAMES, "place": lx.PLACES, "noun": lx.ALL_NOUNS}
    key = rng.choice(tuple(pools))
    said = slots if true else {**slots, key: other(rng, pools[key], slots[key])}
    if coin(rng):
        rest = [slots[name] for name in pools if name != key]
        text = skills.summary_ideal(rng, slots, language, False)
        return answered(language, f"{text} {key}", slots[key] if true else rng.choice((said[key], *rest)), true)
    text = skills.summary_fields(slots, language)["text"].removesuffix(" .")
    return answered(language, text, skills.summary_ideal(rng, said, language, False).removesuffix(" ."), true)


def phrase(rng: Random, language: str) -> str:
    word, noun, true = rng.choice(lx.ADJECTIVES), rng.choice(lx.ALL_NOUNS), coin(rng)
    right = lx.OPPOSITE[word]
    wrong = rng.choice((f"the {word} {noun}", f"the {other(rng, lx.ADJECTIVES, right)} {noun}"))
    if not true and rng.random() < 0.3:
        wrong = f"the {right} {other(rng, lx.ALL_NOUNS, noun)}"
    return answered(language, f"not the {word} {noun}", f"the {right} {noun}" if true else wrong, true)


def review(rng: Random, language: str) -> str:
    good, true = coin(rng), coin(rng)
    tone = "positive" if good == true else "negative"
    noun = NOUNS[language][rng.choice(lx.ALL_NOUNS)]
    if language == "zh":
        word = rng.choice(lx.ZH_POSITIVE if good else lx.ZH_NEGATIVE)
        return answered("zh", f"{noun}{word}", skills.ZH_TONE[tone], true)
    word = rng.choice(lx.POSITIVE if good else lx.NEGATIVE)
    return answered("en", f"the {noun} was {word}", tone, true)


Writer = Callable[[Random, str], str]
WRITERS: dict[Writer, float] = {
    facts: 2, told: 3, members: 1.5, held: 2.5, found: 3, seen: 2,
    listed: 5, story: 5, letter: 1.5, scene: 3, phrase: 1.5, review: 0.5,
}  # fmt: skip
ZH_WRITERS: dict[Writer, float] = {facts: 2, members: 1, held: 2, found: 2, listed: 3, story: 2, review: 1}
