"""benchmarks/: the work both sides are given, and the file of results."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import memory, workloads

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results.json"
FIELDS = {"workload", "ours", "peer", "unit", "ratio", "ratio_low", "ratio_high", "memory_ratio", "limit_fraction"}


def test_results_name_each_workload_once_with_its_fields():
    entries = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = [entry["workload"] for entry in entries]
    assert names == sorted(set(names)) and set(names) <= {*workloads.PPO, *workloads.RANKINGS, "sampling-ragged", "sft"}
    for entry in entries:
        assert {*FIELDS, "date", "machine"} <= entry.keys()
        assert 0 < entry["ratio_low"] <= entry["ratio"] + 1e-12 and entry["ratio"] <= entry["ratio_high"] + 1e-12
        rates = [(a["rate"], b["rate"]) for a, b in zip(entry["runs"]["ours"], entry["runs"]["peer"], strict=True)]
        assert entry["ours"] == pytest.approx(sum(a for a, _ in rates) / len(rates))
        assert entry["ratio_high"] == pytest.approx(max(a / b for a, b in rates))


def test_fixed_queries_are_the_same_each_time():
    queries = workloads.fixed_queries(3, 32)
    assert queries == workloads.fixed_queries(3, 32) and [len(query) for query in queries] == [32, 32, 32]
    assert queries[0] != queries[1] and all(10 <= token < 40_000 for query in queries for token in query)


def test_hh_pairs_share_their_prompt(tmp_path):
    (tmp_path / "hh-rlhf").mkdir()
    head = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    with gzip.open(tmp_path / "hh-rlhf/harmless-base-test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"chosen": head + " because", "rejected": head + " no idea"}) + "\n")
    (row,) = workloads.load_rankings(tmp_path, "rm-hh")
    assert row == {"prompt": head, "answers": [" because", " no idea"], "ranks": [1, 2]}
    assert workloads.pairs_of([row]) == [{"prompt": head, "chosen": " because", "rejected": " no idea"}]


def test_qa_rankings_and_pairs_hold_the_same_judgements(tmp_path):
    (tmp_path / "qa-feedback").mkdir()
    row = {"passages": [["a", "b"], "c"], "question": "q", "preference": [1, 2, 0, 2, 1, 1]}
    row |= {f"prediction {i}": f"p{i}" for i in (1, 2, 3, 4)}
    (tmp_path / "qa-feedback/dev_feedback.json").write_text(json.dumps([row]), encoding="utf-8")
    (ranking,) = workloads.load_rankings(tmp_path, "rm-qa")
    assert ranking["prompt"] == "a b\nc\n\nQuestion: q\nAnswer: "
    # (1,2): 1; (1,3): 3; (1,4): tie; (2,3): 3; (2,4): 2; (3,4): 3. Losses minus wins of each answer:
    assert ranking["ranks"] == [1 - 1, 2 - 1, 0 - 3, 2 - 0]
    pairs = [(pair["chosen"], pair["rejected"]) for pair in workloads.pairs_of([ranking])]
    assert pairs == [("p1", "p2"), ("p3", "p1"), ("p3", "p2"), ("p2", "p4"), ("p3", "p4")]


def test_bytes_of_each_memory_key_by_hand(tmp_path, monkeypatch):
    """One layer of width 64 in float32: embeddings 8192 x 64, attention 4 x 64 x 64, feed-forward 3 x 64 x 170, three
    norms; the head of 65. LoRA of rank 16 on the seven matrices."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    paths = memory.make_models(tmp_path, hidden=64, layers=1)
    matrices = 4 * 64 * 64 + 3 * 64 * 170
    trunk, adapter = 8192 * 64 + matrices + 3 * 64, 16 * (4 * 128 + 3 * 234)
    plain = ("bf16=false", "total_episodes=2", "rollout_batch_size=2", "gradient_checkpointing=false")
    monkeypatch.setattr(memory, "EPISODES", 2)
    measured = {
        keys: memory.measure(*paths, *plain, *keys)
        for keys in ((), ("use_peft=true", "value_use_peft=true"), ("frozen_quantization=int8", "ema_decay=null"))
    }
    full, lora, rounded = measured.values()
    buffers = full["weights"] - 4 * (4 * trunk + 2 * 65)  # rotary frequencies
    assert 0 <= buffers < 4 * 4 * 100
    assert full["gradients"] == 4 * (trunk + 65) and full["average"] == 4 * trunk
    assert lora["gradients"] == 4 * (adapter + 65) and lora["average"] == 4 * adapter
    assert lora["weights"] == 4 * (2 * trunk + 2 * 65 + 2 * adapter) + buffers // 2
    steps = 4 * 2 * (20 + 14 + 14)  # at most: a step count a tensor
    assert 0 <= full["optimiser"] - 4 * 2 * (2 * trunk + 65) < steps
    assert 0 <= lora["optimiser"] - 4 * 2 * (2 * adapter + 65) < steps
    scales = 4 * (4 * 64 + 2 * 170 + 64)
    assert full["weights"] - rounded["weights"] == 2 * (3 * matrices - scales) and rounded["average"] == 0
