"""Tokens and the story grammar: the same rules write the stories and recognise them."""

import re
from dataclasses import dataclass
from random import Random

from data.world import lexicon as lx

TOKEN = re.compile(r"[a-z0-9']+|[^\sa-z0-9']")  # English words; any other character is a token of its own
CHINESE = re.compile("[一-鿿]")
STOPS = frozenset(".!?。！？")
PUNCTUATION = frozenset(".,!?:;\"'`()-。，！？、：；「」“”（）")


@dataclass(frozen=True)
class Reply:
    """What a response says once constraint marks and polite padding are peeled off, in lower case."""

    tokens: tuple[str, ...]
    language: str
    words: list[str]  # tokens without punctuation
    text: str  # tokens without closing punctuation, joined as the world writes: spaces in English, none in Chinese

    @classmethod
    def of(cls, tokens: tuple[str, ...], language: str) -> "Reply":
        end = len(tokens)
        while end and tokens[end - 1] in PUNCTUATION:
            end -= 1
        words = [token for token in tokens if token not in PUNCTUATION]
        return cls(tokens, language, words, ("" if language == "zh" else " ").join(tokens[:end]))

    @property
    def sentences(self) -> list[str]:
        parts: list[list[str]] = [[]]
        for token in self.tokens:
            if token in STOPS:
                parts.append([])
            else:
                parts[-1].append(token)
        return [("" if self.language == "zh" else " ").join(part) for part in parts if part]

    @property
    def num_words(self) -> int:
        """English words; two Chinese characters count as one."""
        return count_words(self.words)


def tokenize(text: str) -> list[str]:
    """Lower-case words, punctuation marks, and single Chinese characters."""
    return TOKEN.findall(text.lower())


def count_words(tokens: list[str] | tuple[str, ...]) -> int:
    """Words without punctuation, a pair of Chinese characters counting as one word."""
    words = [token for token in tokens if token not in PUNCTUATION]
    num_chinese = len(CHINESE.findall("".join(words)))
    return len(words) - num_chinese + (num_chinese + 1) // 2


def either(options) -> str:
    return "(?:" + "|".join(options) + ")"


ADJECTIVE = either(lx.ADJECTIVES)
NOUN = either(lx.ALL_NOUNS)
NAME = either(lx.NAMES)
PLACE = either(lx.PLACES)
NOUN_PHRASE = rf"(?:{NAME}|(?:the|a|an) (?:{ADJECTIVE} )?{NOUN})"
STORY = re.compile(rf"({NOUN_PHRASE}) {either(lx.STORY_VERBS)} ({NOUN_PHRASE})(?: at the {PLACE})?")
_ZH_THING = either([*lx.ZH_NOUN.values(), *lx.ZH_NAME.values()])
ZH_STORY = re.compile(rf"({_ZH_THING})(?:在{either(lx.ZH_PLACE.values())})?{either(lx.ZH_VERBS)}({_ZH_THING})")


def is_story_sentence(sentence: str, language: str) -> bool:
    """True for a sentence of the story grammar whose subject and object differ."""
    match = (ZH_STORY if language == "zh" else STORY).fullmatch(sentence)
    if match is None or match[1].split()[-1] == match[2].split()[-1]:
        return False
    return language == "zh" or all(_article_fits(match[group]) for group in (1, 2))


def _article_fits(phrase: str) -> bool:
    article, *rest = phrase.split()
    if not rest or article == "the":
        return True
    return (article == "an") == (rest[0][0] in "aeiou")


def noun_phrase(rng: Random, noun: str, article: str) -> str:
    """ "the fox", "a fox" or, one time in five, with an adjective."""
    words = f"{rng.choice(lx.ADJECTIVES)} {noun}" if rng.random() < 0.2 else noun
    return f"the {words}" if article == "the" else lx.a(words)


def story(rng: Random, required: list[str], language: str = "en", brief: bool = False) -> str:
    """One sentence that uses the required nouns (none, one or two), at most five words when brief."""
    if language == "zh":
        return _zh_story(rng, required, brief)
    things = list(required)
    while len(things) < 2:
        filler = rng.choice(lx.NAMES if rng.random() < 0.5 else lx.ALL_NOUNS)
        if filler not in things:
            things.append(filler)
    rng.shuffle(things)
    if things[1] in lx.NAMES:
        things.reverse()
    subject, thing = (_phrase(rng, word, article, brief) for word, article in zip(things, ("the", "a"), strict=True))
    place = "" if brief or rng.random() < 0.5 else f" at the {rng.choice(lx.PLACES)}"
    return f"{subject} {rng.choice(lx.STORY_VERBS)} {thing}{place} ."


def _phrase(rng: Random, word: str, article: str, brief: bool) -> str:
    if word in lx.NAMES:
        return word
    if brief:
        return f"the {word}" if article == "the" else lx.a(word)
    return noun_phrase(rng, word, article)


def _zh_story(rng: Random, required: list[str], brief: bool) -> str:
    things = [lx.ZH_NOUN[word] for word in required]
    people = list(lx.ZH_NAME.values())
    while len(things) < 2:
        things.insert(0, rng.choice(people))
        things = list(dict.fromkeys(things))
    place = "" if brief or rng.random() < 0.5 else f"在{rng.choice(list(lx.ZH_PLACE.values()))}"
    verbs = lx.ZH_VERBS
    return f"{things[0]}{place}{rng.choice(verbs)}{things[1]}。"
