"""What is timed: prompts, pairs and sizes, the same for both sides. Imports nothing that only one side has.

Real prompts and pairs come from the folder that `DATA` names (laid out as docs/benchmarks.md says).
"""

import gzip
import itertools
import json
import random
from pathlib import Path

PPO = {
    "ppo-fixed": {"episodes": 64, "batch": 32, "minibatches": 2, "new_tokens": 32},
    "ppo-ragged": {"episodes": 64, "batch": 32, "minibatches": 2, "new_tokens": 128},
}
RANKINGS = {"rm-hh": {"pairs_a_batch": 8}, "rm-qa": {"pairs_a_batch": 4}}
TURN = "\n\nAssistant:"


def fixed_queries(count: int, length: int, vocabulary: int = 40_000) -> list[list[int]]:
    """Random tokens: no response ends early by habit, so both sides do the same work."""
    numbers = random.Random(0)
    return [[numbers.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]


def chat_queries(data: Path, tokenizer, count: int) -> list[list[int]]:
    """The first single-turn prompts of OpenAssistant's prompt lottery, through the chat template."""
    lines = (data / "oasst-en/prompt_lottery_en_250_text.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [[{"role": "user", "content": json.loads(line)}] for line in lines if line.strip()][:count]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats]


def hh_pairs(data: Path, count: int = 48) -> list[dict]:
    """hh-rlhf, harmless: a prompt is everything up to the last assistant turn."""
    with gzip.open(data / "hh-rlhf/harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, count)]
    ends = [row["chosen"].rfind(TURN) + len(TURN) for row in rows]
    return [
        {"prompt": row["chosen"][:end], "answers": [row["chosen"][end:], last_turn(row["rejected"])], "ranks": [1, 2]}
        for row, end in zip(rows, ends, strict=True)
    ]


def last_turn(dialogue: str) -> str:
    return dialogue[dialogue.rfind(TURN) + len(TURN) :]


def qa_rankings(data: Path, count: int = 8) -> list[dict]:
    """qa-feedback: four answers to a question with its passages, judged pair by pair; ties are pairs left out."""
    rows = json.loads((data / "qa-feedback/dev_feedback.json").read_text(encoding="utf-8"))[:count]
    rankings = []
    for row in rows:
        passages = "\n".join(" ".join(p) if isinstance(p, list) else str(p) for p in row["passages"])
        answers = [row[f"prediction {i}"] for i in (1, 2, 3, 4)]
        preferred = list(zip(itertools.combinations(range(4), 2), row["preference"], strict=True))
        wins = [(a, b) if better == 1 else (b, a) for (a, b), better in preferred if better]
        losses = [sum(loser == i for _, loser in wins) - sum(winner == i for winner, _ in wins) for i in range(4)]
        prompt = f"{passages}\n\nQuestion: {row['question']}\nAnswer: "
        rankings.append({"prompt": prompt, "answers": answers, "ranks": losses, "wins": wins})
    return rankings


def pairs_of(rankings: list[dict]) -> list[dict]:
    """A pairwise trainer's rows, in its own format."""
    pairs = []
    for ranking in rankings:
        for winner, loser in ranking.get("wins", [(0, 1)]):
            answers = ranking["answers"]
            pairs.append({"prompt": ranking["prompt"], "chosen": answers[winner], "rejected": answers[loser]})
    return pairs


def load_rankings(data: Path, workload: str) -> list[dict]:
    return hh_pairs(data) if workload == "rm-hh" else qa_rankings(data)
