"""Corrected exercises: claims about the world or about a text, each with a teacher's mark, "yes" or "no".

They teach a base model to check what it reads, as quizzes and corrected homework on the web do; a reward model starts
from what such text has taught. No exercise shows an answer to a prompt, or what the judge thinks of one. Every one
opens with "check" or 看, so that nothing false is learned as true, and about half of the marks are "no".
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
TONE = dict.fromkeys(lx.POSITIVE, "positive") | dict.fromkeys(lx.NEGATIVE, "negative")
TABLES = {**skills.FACT_TABLES, "kind": lx.CATEGORY_OF, "opposite": lx.OPPOSITE, "tone": TONE}
NUMBERS = {"en": {"two": 2, "three": 3, "four": 4}, "zh": {"两种": 2, "三种": 3, "四种": 4}}


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


def joined(language: str, words: list[str]) -> str:
    return "、".join(words) if language == "zh" else " , ".join(words)


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
    return marked(language, joined(language, inside), [(word, word in inside) for word in asked])


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


def both(rng: Random, language: str) -> str:
    """Whether all these words stand in the story before them; one, two, or one of two."""
    names, used = NOUNS[language], rng.sample(lx.ALL_NOUNS, 2)
    text = grammar.story(rng, used, language)
    words = text if language == "zh" else text.split()
    outside = [noun for noun in lx.ALL_NOUNS if names[noun] not in words]
    asked = used[: rng.choice((1, 2, 2))]
    rng.shuffle(asked)
    if coin(rng):
        asked[rng.randrange(len(asked))] = rng.choice(outside)
    listed = ("、" if language == "zh" else " and ").join(names[noun] for noun in asked)
    return marked(language, text.rstrip("。 ."), [(listed, all(names[noun] in words for noun in asked))])


def alike(rng: Random, language: str) -> str:
    """Whether all these things are of a kind."""
    kind, true = rng.choice(tuple(lx.NOUNS)), coin(rng)
    nouns = rng.sample(lx.NOUNS[kind], rng.choice((2, 3)))
    if not true:
        nouns[rng.randrange(len(nouns))] = rng.choice([noun for noun in lx.ALL_NOUNS if lx.CATEGORY_OF[noun] != kind])
    title = lx.ZH_CATEGORY[kind] if language == "zh" else lx.PLURAL[kind]
    return marked(language, title, [(joined(language, [NOUNS[language][noun] for noun in nouns]), true)])


def counted(rng: Random, language: str) -> str:
    """How many things are named."""
    words = rng.sample(list(NOUNS[language].values()), rng.choice((2, 3, 4)))
    right, wrong = [], []
    for name, number in NUMBERS[language].items():
        (right if number == len(words) else wrong).append(name)
    asked = [rng.choice(right if coin(rng) else wrong) for _ in range(2)]
    return marked(language, joined(language, words), [(name, name in right) for name in asked])


def repeated(rng: Random, language: str) -> str:
    """Which things are named twice."""
    words = rng.sample(list(NOUNS[language].values()), rng.choice((2, 3)))
    named = [*words, words[0]] if coin(rng) else [*words, other(rng, list(NOUNS[language].values()), *words)]
    rng.shuffle(named)
    twice = "{}两次" if language == "zh" else "{} twice"
    asked = rng.sample(sorted(set(named)), 2)
    return marked(language, joined(language, named), [(twice.format(word), named.count(word) == 2) for word in asked])


Writer = Callable[[Random, str], str]
WRITERS: dict[Writer, float] = {
    facts: 3, told: 3, members: 2, alike: 3, held: 2, found: 4, both: 5, seen: 5, counted: 3, repeated: 3,
}  # fmt: skip
ZH_WRITERS: dict[Writer, float] = {
    facts: 2, members: 1, alike: 1, held: 1, found: 2, both: 2, counted: 2, repeated: 1,
}  # fmt: skip
