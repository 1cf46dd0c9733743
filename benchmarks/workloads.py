"""What is timed: texts and sizes, the same for both sides. Imports nothing that only one side has.

Real text comes from the folder that `DATA` names (laid out as docs/benchmarks.md says).
"""

import gzip
import itertools
import json
import random
import resource
import string
from pathlib import Path

# Llamas of random weights that are made on the fly (benchmarks/models.py). "0.7M" has preset tiny's sizes.
MODELS = {
    "0.7M": {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 352},
    "6M": {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704},
    "28M": {"vocab_size": 16384, "hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1024},
}
SMOLLM2 = "135M"  # and the one that is exported (data/gguf.py)

FIXED = {
    "kind": "ppo", "model": SMOLLM2, "source": "random", "episodes": 64, "batch": 32, "minibatches": 2,
    "new_tokens": 32, "microbatch_tokens": 1024,
}  # fmt: skip
WORKLOADS = {
    "ppo-fixed": FIXED,
    "ppo-ragged": FIXED | {"source": "oasst", "new_tokens": 128},
    "sampling-ragged": {
        "kind": "sampling", "model": SMOLLM2, "source": "oasst", "queries": 64, "batch": 32, "slots": 64,
        "new_tokens": 128,
    },
    "rm-hh": {"kind": "rm", "model": SMOLLM2, "source": "hh", "count": 48, "prompts_a_step": 8, "pairs_a_step": 8},
    "rm-qa": {"kind": "rm", "model": SMOLLM2, "source": "qa", "count": 8, "prompts_a_step": 1, "pairs_a_step": 4},
    "sft": {"kind": "sft", "model": SMOLLM2, "source": "oasst-trees", "count": 64, "held_out": 8, "batch": 8},
}  # fmt: skip
# The same with enough of it to fill a GPU for some seconds.
BATCH_OF_128 = {"episodes": 512, "batch": 128, "microbatch_tokens": 32768}
LARGER = {
    "ppo-fixed": BATCH_OF_128,
    "ppo-ragged": BATCH_OF_128,
    "sampling-ragged": {"queries": 512, "batch": 128, "slots": 256},
    "rm-hh": {"count": 512, "prompts_a_step": 32, "pairs_a_step": 32},
    "rm-qa": {"count": 64, "prompts_a_step": 4, "pairs_a_step": 16},
}
GPU_WORKLOADS = {f"gpu-{name}": WORKLOADS[name] | more for name, more in LARGER.items()}
WORKLOADS |= {f"toy-{name}": spec | {"model": "0.7M"} for name, spec in WORKLOADS.items()} | GPU_WORKLOADS


def ranked(k: int) -> dict:
    """Eight prompts with K answers, all pairs; about eight pairs a step on both sides."""
    prompts = max(1, 8 // (k * (k - 1) // 2))
    return {"kind": "rm", "model": "6M", "source": "words", "k": k, "count": 8, "prompts_a_step": prompts,
            "pairs_a_step": 8}  # fmt: skip


# How the rate and the memory grow with one size, the others fixed: axis -> size -> workload, one rollout or epoch each.
GROWTH_FIXED = FIXED | {"model": "6M", "episodes": 32}
GROWTH = {
    "length": {n: GROWTH_FIXED | {"new_tokens": n} for n in (32, 64, 128, 256, 512)},
    "batch": {n: GROWTH_FIXED | {"episodes": n, "batch": n} for n in (16, 32, 64, 128, 256)},
    "k": {k: ranked(k) for k in (2, 3, 5, 9)},
    "model": {
        millions: GROWTH_FIXED | {"model": name}
        for millions, name in ((0.73, "0.7M"), (5.9, "6M"), (27.6, "28M"), (134.5, SMOLLM2))
    },
}
POINTS = {f"{axis}-{size}": spec for axis, specs in GROWTH.items() for size, spec in specs.items()}
SPECS = WORKLOADS | POINTS

# Both sides' names; the rest of the settings are the stage's own, given to the peer in peer.py.
SFT = {
    "num_train_epochs": 1, "max_length": 2048, "learning_rate": 1e-5, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "max_grad_norm": 1.0, "completion_only_loss": True, "logging_steps": 1,
}  # fmt: skip

FILES = {
    "oasst": "oasst-en/prompt_lottery_en_250_text.jsonl",
    "oasst-trees": "oasst-en/en_100_tree.jsonl",
    "hh": "hh-rlhf/harmless-base-test.jsonl.gz",
    "qa": "qa-feedback/dev_feedback.json",
}  # of each source that is no random text
TURN = "\n\nAssistant:"
# Of a token and weight: 2 forwards, 6 forwards and backwards. PPO samples, reads reference, reward and value model, and
# trains two models; with the sampler's log-probabilities kept, the policy need not be read again.
FLOPS = {"ppo": 20, "rm": 6, "sft": 6, "sampling": 2}
TEMPERATURE = 1.0  # of all sampling, on both sides


def model_folder(smollm2: str, spec: dict) -> Path:
    """The made models lie beside the exported one."""
    return Path(smollm2) if spec["model"] == SMOLLM2 else Path(smollm2).parent / f"llama-{spec['model']}"


def start_measuring() -> None:
    """Before a workload: a GPU's peak is this workload's alone, not the process's."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def measured(count: float, unit: str, seconds: float, work: dict[str, int], **more) -> dict:
    """One run's result. `work`: counts that must be the same on both sides."""
    return {"rate": count / seconds, "unit": unit, "seconds": seconds, "peak_gib": peak_gib(), "work": work, **more}


def peak_gib() -> float:
    """Most memory this process has held: the GPU's where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def queries(data: Path, tokenizer, spec: dict) -> list[list[int]]:
    count = spec["episodes"] if spec["kind"] == "ppo" else spec["queries"]
    if spec["source"] == "random":
        return random_queries(count, 32, MODELS.get(spec["model"], {}).get("vocab_size", 40_000))
    return chat_queries(data, tokenizer, count)


def random_queries(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random tokens: no response ends early by habit, so both sides do the same work."""
    numbers = random.Random(0)
    return [[numbers.randrange(10, vocabulary) for _ in range(length)] for _ in range(count)]


def chat_queries(data: Path, tokenizer, count: int) -> list[list[int]]:
    """The first single-turn prompts of OpenAssistant's prompt lottery, through the chat template; over and over."""
    lines = [line for line in (data / FILES["oasst"]).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [chat_query(tokenizer, json.loads(line)) for line in itertools.islice(itertools.cycle(lines), count)]


def chat_query(tokenizer, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def demonstrations(data: Path, spec: dict, longest: int = 2000) -> tuple[list[dict], list[dict]]:
    """OpenAssistant's prompts with their best reply, `longest` characters at most: training and held-out rows."""
    rows = []
    for line in (data / FILES[spec["source"]]).read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)["prompt"]
        best = [reply["text"] for reply in prompt["replies"] if reply.get("rank") == 0]
        if best and len(prompt["text"]) + len(best[0]) <= longest:
            rows.append({"prompt": prompt["text"], "completion": best[0]})
    return rows[: spec["count"]], rows[spec["count"] : spec["count"] + spec["held_out"]]


def demonstration_tokens(tokenizer, row: dict) -> dict[str, list[int]]:
    """The tokens that our stage makes of a demonstration, for a trainer that takes tokens; 1 marks what is learned."""
    query = chat_query(tokenizer, row["prompt"])
    response = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": query + response, "completion_mask": [0] * len(query) + [1] * len(response)}


def load_rankings(data: Path, spec: dict) -> list[dict]:
    """Rows of {"prompt", "answers", "ranks": one an answer, the least is the best}."""
    if spec["source"] == "words":
        return word_rankings(spec["count"], spec["k"])
    return {"hh": hh_pairs, "qa": qa_rankings}[spec["source"]](data, spec["count"])


def word_rankings(count: int, k: int) -> list[dict]:
    """Prompts of 96 made-up words, answers of 32."""
    numbers = random.Random(0)

    def words(n: int) -> str:
        return " ".join("".join(numbers.choices(string.ascii_lowercase, k=4)) for _ in range(n))

    ranks = list(range(k))
    return [{"prompt": words(96), "answers": [f" {words(32)}" for _ in ranks], "ranks": ranks} for _ in range(count)]


def hh_pairs(data: Path, count: int) -> list[dict]:
    """hh-rlhf, harmless: a prompt is everything up to the last assistant turn."""
    with gzip.open(data / FILES["hh"], "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, count)]
    ends = [row["chosen"].rfind(TURN) + len(TURN) for row in rows]
    return [
        {"prompt": row["chosen"][:end], "answers": [row["chosen"][end:], last_turn(row["rejected"])],
         "ranks": [1, 2]}
        for row, end in zip(rows, ends, strict=True)
    ]  # fmt: skip


def last_turn(dialogue: str) -> str:
    return dialogue[dialogue.rfind(TURN) + len(TURN) :]


def qa_rankings(data: Path, count: int) -> list[dict]:
    """qa-feedback: four answers to a question with its passages, judged pair by pair. An answer's rank is its defeats
    less its victories; both sides train on the pairs whose ranks differ, those that were judged a tie too."""
    rows = json.loads((data / FILES["qa"]).read_text(encoding="utf-8"))[:count]
    rankings = []
    for row in rows:
        passages = "\n".join(" ".join(p) if isinstance(p, list) else str(p) for p in row["passages"])
        answers = [row[f"prediction {i}"] for i in (1, 2, 3, 4)]
        preferred = list(zip(itertools.combinations(range(4), 2), row["preference"], strict=True))
        wins = [(a, b) if better == 1 else (b, a) for (a, b), better in preferred if better]
        losses = [sum(loser == i for _, loser in wins) - sum(winner == i for winner, _ in wins) for i in range(4)]
        prompt = f"{passages}\n\nQuestion: {row['question']}\nAnswer: "
        rankings.append({"prompt": prompt, "answers": answers, "ranks": losses})
    return rankings


def pairs_of(rankings: list[dict]) -> list[dict]:
    """A pairwise trainer's rows, in its own format: every pair of answers whose ranks differ."""
    pairs = []
    for ranking in rankings:
        answers, ranks = ranking["answers"], ranking["ranks"]
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                pairs.append({"prompt": ranking["prompt"], "chosen": answers[better], "rejected": answers[worse]})
    return pairs
