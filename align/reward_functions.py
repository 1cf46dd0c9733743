"""Reward functions to name in `reward` beside a model: what a policy learns to do to please one, and should not.

Each has TRL's signature, fn(prompts=, completions=, **columns) -> one number a completion, and is 0 where all is well.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from align.types import Text

MIN_SHARE = 0.1  # of a prompt's letters that a script must have to count as one of its own: a name in it does not
TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HALFWIDTH": "CJK", "HANGUL": "CJK", "FULLWIDTH": "LATIN"}
NO_SPACES = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Chinese characters: each is a word
WORD = re.compile(rf"[{NO_SPACES}]|[^\W{NO_SPACES}]+")


def same_script(prompts: Sequence[Text], completions: Sequence[str], **columns) -> list[float]:
    """Minus the share of a completion's letters in scripts that its prompt (of a conversation: the last message) lacks.

    0 for a Chinese answer to a Chinese question, -1 for an English one, -0.2 where a fifth of the letters are a Latin
    name's; 0 where prompt or completion has no letters. Scripts are the first words of Unicode's names; Chinese,
    Japanese and Korean are one, and languages that share a script are not told apart. A prompt that asks for another
    script ("translate into Chinese") takes points off the right answer: keep the weight under what that one is worth.
    """
    return [0.0 - foreign_share(last_message(p), c) for p, c in zip(prompts, completions, strict=True)]


def no_repeats(prompts: Sequence[Text], completions: Sequence[str], **columns) -> list[float]:
    """Minus the share of a completion's word trigrams that stood in it before (Welleck et al. 2019); near -1 in a loop.

    0 under three words. Case and punctuation make no difference; a Chinese character or kana is a word.
    """
    return [0.0 - repeated_share(WORD.findall(completion.lower())) for completion in completions]


def repeated_share(words: list[str], n: int = 3) -> float:
    ngrams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def foreign_share(prompt: str, completion: str) -> float:
    asked, written = scripts(prompt), scripts(completion)
    own = {script for script, count in asked.items() if count >= MIN_SHARE * asked.total()}
    if not own or not written:
        return 0.0
    return sum(count for script, count in written.items() if script not in own) / written.total()


def scripts(text: str) -> Counter[str]:
    """How many letters of `text` each script has: LATIN, CJK, CYRILLIC, ..."""
    words = (unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    return Counter(TOGETHER.get(word, word) for word in words if word)


def last_message(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
