"""align/reward_functions.py: what a policy may do to please a reward model, as numbers to take off."""

import pytest

from align.reward_functions import no_repeats, same_script
from align.rewards import FunctionReward
from align.types import Episode, Prompt


@pytest.mark.parametrize(
    ("prompt", "completion", "score"),
    [
        ("你好吗？", "我很好，谢谢。", 0),
        ("你好吗？", "I am fine.", -1),
        ("Hi, who are you?", "我是一个助手", -1),
        ("Что такое PPO?", "Алгоритм PPO", -0),  # 3 of 12 letters of the prompt are Latin: both scripts are its own
        ("什么是强化学习？请说说", "用 PPO 训练", -3 / 6),
        ("東京タワーはどこ？", "にほんの東京にあります", 0),  # kana and kanji are one
        ("한국어로 답해 주세요", "네, 알겠습니다", 0),
        ("Wer bist du?", "Ein Größenwahnsinniger über allem", 0),
        ("ｈｅｌｌｏ", "hello", 0),  # full-width Latin
        ("12 + 30?", "forty-two", 0),  # no letters to go by
        ("你好吗？", "42 :-)", 0),
        ("你好吗？", "", 0),
        ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好吗？"}], "I am fine.", -1),
    ],
)
def test_letters_in_another_script_than_the_question_are_counted(prompt, completion, score):
    assert same_script([prompt], [completion]) == [pytest.approx(score)]


def test_a_name_in_a_question_does_not_make_its_script_the_answers():
    name = "请介绍一下那位非常有名的美国物理学家费曼的生平以及他的主要贡献吧 MIT"  # 3 of 34 letters are Latin
    assert same_script([name], ["Feynman"]) == [-1.0]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("a dog is not a cat", 0),
        ("yes, yes. Yes! YES", -1 / 2),  # two trigrams, the same
        ("a b c a b c", -1 / 4),  # abc bca cab abc
        ("no no " * 50, -97 / 98),
        ("很好很好很好", -2 / 4),  # 很好很 好很好 很好很 好很好
        ("用PPO训练用PPO训练", -2 / 6),  # eight words, for the Latin ones are one each
        ("one two", 0),
        ("", 0),
    ],
)
def test_trigrams_that_come_again_are_counted(completion, score):
    assert no_repeats(["p"], [completion]) == [pytest.approx(score)]


def test_it_is_a_term_of_ppos_reward(tiny_codec):
    """The tokens of two answers to one Chinese question, one in each script."""
    rows = tiny_codec.responses(["苹果、香蕉和梨。", "a cow, a dog and a bird"])
    episodes = [Episode((5,), tuple(row), True) for row in rows]
    reward = FunctionReward("align.reward_functions:same_script", tiny_codec)
    assert reward([Prompt("用中文说出三种水果。")] * 2, episodes) == [0.0, -1.0]
