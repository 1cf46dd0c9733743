"""align/reward_functions.py: what a policy may do to please a reward model, as numbers to take off."""

import pytest

from align.reward_functions import no_repeats, same_script, words
from align.rewards import FunctionReward
from align.types import Episode, Prompt

PROSE = (
    "The tide was out when we reached the harbour, and the boats lay on their sides in the mud. A boy sold us oranges. "
    "He told us that the ferry would not leave before noon, so we walked up to the old church and sat in its shade."
)
CHINESE = "人工智能研究如何让机器完成需要人类智能的任务。它包括学习、推理和理解语言，今天已经用在医疗和教育中。"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("prompt", "completion", "score"),
    [
        ("你好吗？", "我很好，谢谢。", 0),
        ("你好吗？", "I am fine.", -1),
        ("Hi, who are you?", "我是一个助手", -1),
        ("什么是 PPO？", "PPO is an algorithm", -1),  # a name in a question is not its script
        ("如何用 Python 读取文件？", "Use open", -1),
        ("什么是强化学习？", "用 PPO 训练", -1 / 4),
        ("Что такое PPO?", "Алгоритм PPO", -1 / 2),
        ("hello 你好", "你好 hello", -1 / 3),  # one of three words is under the share
        ("say hello in 你好吗", "你好 hello", 0),  # three and three
        ("東京で人気の飲み物は？", "コーヒーやビール、様々です", 0),
        ("東京で人気の飲み物は？", "々ー", 0),
        ("你好吗？", "こんにちは", -1),
        ("한국어로 답해 주세요", "네, 알겠습니다", 0),
        ("한국어로 답해 주세요", "好的", -1),
        ("Wer bist du?", "Ein naïver Größenwahnsinniger über allem", 0),
        ("आप कैसे हैं?", "मैं ठीक हूँ", 0),
        ("ｈｅｌｌｏ", "hello 𝐀 ℝ", 0),  # the same letters in other shapes
        ("12 + 30?", "forty-two", 0),  # no letters to go by
        ("你好吗？", "42 :-)", 0),
        ("你好吗？", "", 0),
        ("怎么打印？", "```python\nprint('hello')\n```", 0),
        ("怎么打印？", "用 `print(x)`，见 https://docs.python.org/3/ 。", 0),
        ("Human: 你好吗？\n\nAssistant:", "I am fine.", -1),
        ("Human: 你好吗？\n\nAssistant: I am here to help you\n\nHuman: 再说\n\nAssistant:", "I am", -1),
        ((said("system", "Be kind."), said("user", "你好吗？")), "I am fine.", -1),
        ((said("user", "你好吗？"), said("assistant", "I am fine."), said("user", "ok")), "我很好", 0),
    ],
)
def test_words_in_another_script_than_the_question_are_counted(prompt, completion, score):
    assert same_script([prompt], [completion]) == [pytest.approx(score)]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("a dog is not a cat", 0),
        ("yes, yes. Yes! YES", -1 / 2),  # two trigrams, the same; signs count for nothing
        ("one two three one two three", -1 / 4),
        ("the end is near " * 50, -194 / 198),
        ("no no " * 50, -193 / 195),  # 200 letters, two runs of six
        ("ha" * 100, -193 / 195),
        ("!" * 100, -94 / 95),
        ("我很好我很好我很好", -1 / 4),  # nine characters, four runs: the fourth is the first
        ("你好，你好。你好！你好；你好", -3 / 5),  # ten characters, whatever stands between
        ("hahaha", 0),
        (PROSE, 0),
        (CHINESE, 0),
        ("", 0),
    ],
)
def test_what_comes_again_is_counted(completion, score):
    assert no_repeats(["p"], [completion]) == [pytest.approx(score)]


def test_words_keep_their_marks():
    assert words("नमस्ते का की") == ["नमस्ते", "का", "की"]
    assert words("Nai\u0308ve, NAÏVE") == ["naïve", "naïve"]
    assert words("你𠮷々 ok") == ["你", "𠮷", "々", "ok"]


def test_they_are_terms_of_ppos_reward(tiny_codec):
    """The tokens of two answers to one Chinese question, one in each script."""
    rows = tiny_codec.responses(["苹果、香蕉和梨。", "a cow, a dog and a bird"])
    episodes = [Episode((5,), tuple(row), True) for row in rows]
    reward = FunctionReward("align.reward_functions:same_script", tiny_codec)
    assert reward([Prompt("用中文说出三种水果。")] * 2, episodes) == [0.0, -1.0]
    loop = [Episode((5,), tuple(tiny_codec.responses(["a cow and a dog a cow and a dog"])[0]), True)]
    assert FunctionReward("align.reward_functions:no_repeats", tiny_codec)([Prompt("p")], loop) == [-3 / 8]
