"""benchmarks/reward_quality.py: the same pairs for both sides, and accuracies that arithmetic by hand gives."""

import argparse
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainingArguments
from trl import RewardConfig, RewardTrainer

from align.errors import UserError
from align.evaluate.win_rate import accuracy_interval
from align.models import disable_dropout, load_scalar_model
from align.ranking import RankedTokens, RankingCollator, encode_rankings, split_pairs
from align.trainer import PairTrainer
from align.types import Ranking
from benchmarks.reward_quality import (
    SETTINGS,
    SIDES,
    Right,
    bring_data,
    pair_row,
    pick,
    report,
    resampled,
    same_arguments,
    save_first_weights,
)


def lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_pairs_better_completion_is_chosen_whatever_its_place():
    ranked = RankedTokens((1, 2), ((3,), (4, 5), (6,)), (1.0, 0.0, 1.0))
    rows = [pair_row(element["ranking"]) for element in split_pairs([{"ranking": ranked}])]
    assert rows == [
        {"chosen_ids": [1, 2, 4, 5], "rejected_ids": [1, 2, 3]},
        {"chosen_ids": [1, 2, 4, 5], "rejected_ids": [1, 2, 6]},
    ]  # the tie of the first and the third is no pair


def test_pick_takes_the_first_of_each_source(tmp_path):
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "rankings.jsonl", [{"source": s, "n": n} for n, s in enumerate("aababb")])
    with pytest.raises(UserError, match="c gives no rankings"):
        pick("rankings", {"a": 2, "b": 1, "c": 1}, tmp_path, "train")
    assert not (tmp_path / "train.jsonl").exists()
    pick("rankings", {"a": 2, "b": 1}, tmp_path, "train")
    assert [json.loads(line)["n"] for line in (tmp_path / "train.jsonl").open()] == [0, 1, 2]
    pick("rankings", {"a": 9, "b": 0}, tmp_path, "train")  # all there are
    assert [json.loads(line)["n"] for line in (tmp_path / "train.jsonl").open()] == [0, 1, 3]


def test_ones_own_rankings_take_the_place_of_public_ones(tmp_path):
    files = {name: tmp_path / f"my_{name}.jsonl" for name in ("train", "held_out", "demonstrations")}
    for name, path in files.items():
        lines(path, [{"of": name, "n": n} for n in range(3)])
    args = argparse.Namespace(train_file=files["train"], held_out_file=files["held_out"], demonstrations_file=None)
    with pytest.raises(UserError, match="give --data, or --demonstrations_file too"):
        bring_data(args, tmp_path)
    args.demonstrations_file, args.train_rankings = files["demonstrations"], 2
    bring_data(args, tmp_path)
    assert [json.loads(line)["n"] for line in (tmp_path / "train.jsonl").open()] == [0, 1]
    assert (tmp_path / "held_out.jsonl").read_bytes() == files["held_out"].read_bytes()


def test_a_benchmark_goes_on_with_its_own_arguments_alone(tmp_path):
    same_arguments(tmp_path / "out", {"model": "m", "scale": 1.0})
    same_arguments(tmp_path / "out", {"model": "m", "scale": 1.0})
    with pytest.raises(UserError, match="scale was 1.0, not 2.0"):
        same_arguments(tmp_path / "out", {"model": "m", "scale": 2.0})


def test_the_interval_holds_what_another_seed_would_give():
    """Seeds that differ by 0.1 where prompts differ little: prompts alone would claim the mean of these seeds."""
    rng = np.random.default_rng(0)
    safe, naive = [], []
    prompts = np.arange(200)
    for _ in range(60):
        sides = {side: (rng.random((5, 200)) < 0.6 + 0.1 * rng.standard_normal((5, 1))) * 1.0 for side in SIDES}
        interval, alone = (
            resampled([Right([], sides, prompts)])["ours"],
            accuracy_interval(sides["ours"].mean(axis=0), prompts, 0),
        )
        safe.append(interval.low <= 0.6 <= interval.high)
        naive.append(alone.low <= 0.6 <= alone.high)
        assert interval.mean == pytest.approx(sides["ours"].mean())
    assert np.mean(safe) >= 0.85 > 0.7 > np.mean(naive)


@pytest.fixture
def output(tmp_path):
    """Two prompts, K of 3 and of 2, four untied pairs; two seeds a side."""

    def row(prompt, source, *texts):
        completions = [{"completion": text, "rank": rank} for rank, text in enumerate(texts)]
        return {"prompt": prompt, "source": source, "completions": completions}

    rows = [row("p", "dev_feedback", "best", "second one", "3"), row("q", "harmless-base-test", "yes", "no!!!")]
    lines(tmp_path / "held_out.jsonl", rows)
    lines(tmp_path / "train.jsonl", rows)
    scores = {
        "ours-0": [[3, 2, 1], [1, 0]], "ours-1": [[3, 1, 2], [1, 0]],  # 4 and 3 of 4 right
        "trl-0": [[1, 2, 3], [0, 1]], "trl-1": [[2, 2, 1], [1, 0]],  # 0, and 3.5 with a tie
    }  # fmt: skip
    for name, found in scores.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"seconds": 1.0, "scores": found}))
    return tmp_path


def test_accuracies_by_hand(output):
    results = report(output, argparse.Namespace(model="m", seeds=2, learning_rate=1e-5, group_by="source", epochs=1.0))
    everything, many = results["held_out"]["all"], results["held_out"]["k_over_2"]
    assert everything["by_seed"] == {"ours": [1.0, 0.75], "trl": [0.0, 0.875]}
    assert everything["ours"]["mean"] == 0.875 and everything["trl"]["mean"] == 0.4375
    assert everything["difference"]["mean"] == pytest.approx(0.4375)
    assert many["pairs"] == 3 and many["ours"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert everything["length_only"]["mean"] == 0.5  # best > 3, second one > 3, best < second one, yes < no!!!
    assert results["training"] == {"prompts": 2, "pairs": 4}
    # The mean over sources: ours (5/6 + 1) / 2; TRL 0 and (1/2 + 1 + 1) / 3 of dev_feedback, 0 and 1 of the other.
    assert results["held_out"]["macro"]["ours"]["mean"] == pytest.approx((5 / 6 + 1) / 2)
    assert results["held_out"]["macro"]["trl"]["mean"] == pytest.approx((2.5 / 6 + 0.5) / 2)
    # By prompt: p is right in 3 of 3 and 2 of 3 (ours), 0 and 2.5 of 3 (TRL), q in 1 and 1, 0 and 1.
    assert results["held_out"]["by_prompt"]["ours"]["mean"] == pytest.approx((1 + 2 / 3 + 1 + 1) / 4)
    assert results["held_out"]["by_prompt"]["trl"]["mean"] == pytest.approx((0 + 2.5 / 3 + 0 + 1) / 4)
    assert results["held_out"]["macro"]["prompts"] == everything["prompts"] == 2
    assert results["settings"]["learning_rate"] == 1e-5
    assert results["held_out"]["harmless-base-test"]["trl"]["mean"] == 0.5


def test_training_on_pairs_is_what_TRL_does(tiny_llama, tiny_codec, tmp_path):
    """`batch_element: pair` and TRL's RewardTrainer: the same weights after three steps, each of all pairs, so that no
    order of rows tells them apart. Adam's epsilon is large, or it would blow rounding up to whole steps.

    So what whole rankings are compared with in bench-overfit is TRL's training."""
    tiny_llama.resize_token_embeddings(len(tiny_codec.tokenizer))
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_codec.save(tmp_path / "base")
    rankings = [
        Ranking("Name a pet.", ("a cow", "a dog and a bird", "fox", "no"), (1.0, 0.0, 1.0, 2.0)),
        Ranking("The opposite of hot", ("cold", "two ripe pears"), (0.0, 1.0)),
        Ranking("Which boat?", ("the red one", "yes", "no boat"), (2.0, 0.0, 1.0)),
    ]  # 5 untied pairs, 1 and 3
    pairs = split_pairs(encode_rankings(rankings, tiny_codec))
    save_first_weights(str(tmp_path / "base"), tmp_path / "start", tiny_codec, seed=0)
    settings = dict(
        SETTINGS, learning_rate=1e-2, adam_epsilon=1e-4, num_train_epochs=3,
        per_device_train_batch_size=9, lr_scheduler_type="constant",
        weight_decay=0.0, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    ours = load_scalar_model(str(tmp_path / "start"))
    disable_dropout(ours)
    args = TrainingArguments(output_dir=str(tmp_path / "ours"), remove_unused_columns=False, **settings)
    PairTrainer(ours, args, train_dataset=pairs, data_collator=RankingCollator(tiny_codec.pad_id)).train()

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", num_labels=1)
    theirs.config.pad_token_id = tiny_codec.pad_id
    args = RewardConfig(output_dir=str(tmp_path / "theirs"), max_length=None, gradient_checkpointing=False, **settings)
    rows = Dataset.from_list([pair_row(element["ranking"]) for element in pairs])
    RewardTrainer(theirs, args, train_dataset=rows, processing_class=tiny_codec.tokenizer).train()

    start, trained = load_scalar_model(str(tmp_path / "start")).model.state_dict(), ours.model.state_dict()
    assert len(pairs) == 9 and float((trained["score.weight"] - start["score.weight"]).abs().max()) > 0.02
    for name, weight in theirs.state_dict().items():
        assert torch.allclose(trained[name], weight, atol=1e-5), name
    assert torch.equal(trained["score.bias"], start["score.bias"])  # which pairs say nothing of, and TRL has not
