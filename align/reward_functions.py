"""Reward functions to name in `reward` beside a model: what a policy learns to do to please one, and should not.

Each has TRL's signature, fn(prompts=, completions=, **columns) -> one number from -1 to 0 a completion. Alone they are
no reward: an empty answer gets 0 of both.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from align.types import Text

MIN_SHARE = 0.35  # of a prompt's words that a script must have to count as one of its own: a name in it does not
KANA = ("HIRAGANA", "KATAKANA")
NOT_SPACED = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+", re.DOTALL)
LABEL = re.compile(r"^\s*(Human|User|Assistant|System)\s*[:：]", re.MULTILINE)  # of a dialogue written as text


def same_script(prompts: Sequence[Text], completions: Sequence[str], **columns) -> list[float]:
    """Minus the share of a completion's words in scripts that its prompt (of a conversation: the user's side) lacks.

    0 for a Chinese answer to a Chinese question, -1 for an English one; 0 where prompt or completion has no word. A
    Chinese character or a kana is a word, a whole phrase of Thai, Lao or Khmer another; code and URLs are none.
    Languages that share a script are not told apart, nor Chinese from Japanese where the question has kana. A prompt
    that asks for another script ("translate into Chinese") takes points off the right answer: keep the weight under
    what that one is worth.
    """
    return [0.0 - foreign_share(asked(p), c) for p, c in zip(prompts, completions, strict=True)]


def no_repeats(prompts: Sequence[Text], completions: Sequence[str], **columns) -> list[float]:
    """Minus the share of a completion's word trigrams that stood in it before (Welleck et al. 2019); near -1 in a loop.

    Case and punctuation make no difference. Where words are not parted by spaces, or are far too long or short for
    words, runs of six characters are counted instead. Plain prose has a few of either: some -0.02 over 300 words.
    """
    return [0.0 - repeated_share(completion) for completion in completions]


def foreign_share(prompt: str, completion: str) -> float:
    own, written = scripts(prompt), scripts(CODE.sub(" ", completion))
    known = {script for script, count in own.items() if count >= MIN_SHARE * own.total()}
    if any(own[script] for script in KANA):  # Japanese: written in all three
        known |= {"CJK", *KANA}
    if not known or not written:
        return 0.0
    return sum(count for script, count in written.items() if script not in known) / written.total()


def asked(prompt: Text) -> str:
    """What the user wrote."""
    if isinstance(prompt, str):
        before, *turns = LABEL.split(prompt)
        said = [text for role, text in zip(turns[::2], turns[1::2], strict=True) if role in ("Human", "User")]
        said = [before, *said]
    else:
        said = [message["content"] for message in prompt if message["role"] == "user"]
    return CODE.sub(" ", "\n".join(said))


def scripts(text: str) -> Counter[str]:
    """How many words of `text` are in each script, the first word of its letters' Unicode names: LATIN, CJK, ..."""
    letters = [[c for c in word if unicodedata.category(c) in ("Ll", "Lo")] for word in words(text)]
    return Counter(unicodedata.name(own[0], "OTHER").partition(" ")[0] for own in letters if own)


def words(text: str) -> list[str]:
    """Runs of letters, their marks and digits, in lower case; a character of a script without spaces is one alone."""
    spaced = NOT_SPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).lower())
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced).split()


def repeated_share(text: str) -> float:
    units, size = words(text), 3
    written = "".join(units)
    if not 2 * len(units) < len(written) <= 20 * len(units):
        units, size = list(written or "".join(text.split())), 6  # of an answer of signs alone, the signs
    ngrams = list(zip(*(units[i:] for i in range(size)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
