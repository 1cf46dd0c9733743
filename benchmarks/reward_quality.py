"""Is a reward model trained on whole rankings as good as TRL's, trained on the same rankings' untied pairs?

    python -m benchmarks.reward_quality --data FOLDER --model MODEL --output runs/reward-quality [--scale 2] [--seeds 3]
    python -m benchmarks.reward_quality --model MODEL --train_file F --held_out_file F --demonstrations_file F

Public rankings, or any in our format (docs/formats.md), grouped by a column of theirs. Same base, head,
tokens, schedule, epochs and number of optimiser steps, at one learning rate, tuned for neither side; only the batch
element differs: a prompt with its K completions (stage `rm`) against pairs (`trl.RewardTrainer`). Each run of the two
sides is a process of its own; one that is done is not run again, so a stopped benchmark goes on where it was, with the
same arguments. Writes results.json with held-out accuracy and paired gain, averaged over seeds: overall, K > 2, by
group, as the mean over groups (`macro`), by prompt, beside length alone. The 95% intervals draw seeds and prompts anew
together (few seeds show less than their whole spread), those of length alone prompts.
"""

import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from align.data import load_rankings
from align.errors import UserError
from align.evaluate.reward_report import prompts_of, right, untied_pairs
from align.evaluate.win_rate import Interval, accuracy_gain, accuracy_interval
from align.files import plain, write_json, write_jsonl
from align.models import load_scalar_model, save_scalar_model
from align.prepare import main as prepare
from align.ranking import encode_rankings, score_rankings, split_pairs
from align.runtime import has_bf16, tune_cpu
from align.splits import prompt_key
from align.text import Codec
from align.track import read_jsonl
from align.types import Ranking
from stages import rm

CONFIG = Path(__file__).with_suffix(".yaml")
# Rankings of each source, times --scale and --held_out_scale; fewer where a source has no more.
TRAIN = {"en_100_tree": 32, "dev_feedback": 40, "harmless-base-test": 100}
HELD_OUT = {"en_100_tree": 40, "dev_feedback": 70, "harmless-base-test": 120}
PROMPTS_A_PASS, PAIRS_A_PASS = (8, 32) if torch.cuda.is_available() else (4, 2)  # what SmolLM2-135M has memory for
SETTINGS = {"adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0}
SIDES = ("ours", "trl")
FREE = ("output", "seeds", "run", "group_by")  # may change when a benchmark goes on
RESAMPLES = 2000


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.reward_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder laid out as docs/benchmarks.md says")
    parser.add_argument("--train_file", help="rankings to train on, in place of --data")
    parser.add_argument("--held_out_file", help="rankings to compare on, in place of --data")
    parser.add_argument("--demonstrations_file", help="to normalise our reward model on, in place of --data")
    parser.add_argument("--train_rankings", type=int, help="only the first of --train_file")
    parser.add_argument("--group_by", default="source", help="column of the held-out rankings")
    parser.add_argument("--model", required=True, help="folder of the base model or of an SFT model")
    parser.add_argument("--output", default="runs/reward-quality")
    parser.add_argument("--scale", type=float, default=1.0, help="of the training prompts")
    parser.add_argument("--held_out_scale", type=float, default=1.0, help="of the held-out prompts")
    parser.add_argument("--learning_rate", type=float, default=1e-5, help="of both sides")
    parser.add_argument("--prompts_a_step", type=int, default=8, help="of both sides, TRL's as pairs")
    parser.add_argument("--prompts_a_pass", type=int, default=PROMPTS_A_PASS, help="ours, of one forward and backward")
    parser.add_argument("--pairs_a_pass", type=int, default=PAIRS_A_PASS, help="TRL's")
    parser.add_argument(
        "--epochs", type=float, default=1.0, help="ours; TRL's is one, its pairs show each answer K - 1 times"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", nargs=2, metavar=("SIDE", "SEED"), help="one run alone (what each process does)")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if args.run:
        return {"ours": train_ours, "trl": train_trl}[args.run[0]](args, output, int(args.run[1]))
    same_arguments(output, {name: getattr(args, name) for name in sorted(vars(args)) if name not in FREE} | SETTINGS)
    if not (output / "demonstrations.jsonl").exists():  # the last of three
        bring_data(args, output) if args.data is None else make_data(args.data, output, args.scale, args.held_out_scale)
    for seed, side in itertools.product(range(args.seeds), SIDES):
        if (output / f"{side}-{seed}.json").exists():
            continue
        print(f"==> {side}, seed {seed}", flush=True)
        command = [sys.executable, "-m", "benchmarks.reward_quality", *argv, "--run", side, str(seed)]
        subprocess.run(command, check=True)
    results = report(output, args)
    write_json(output / "results.json", results)
    print_table(results)


def same_arguments(output: Path, arguments: dict) -> None:
    """Store what a benchmark was started with. Raises UserError where it would go on with something else."""
    path = output / "arguments.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        return write_json(path, arguments)
    stored = {"epochs": 1.0} | json.loads(path.read_text(encoding="utf-8"))  # older ones do not say
    for key, value in arguments.items():
        if stored.get(key) != value:
            raise UserError(f"{path}: {key} was {stored.get(key)}, not {value}; choose another --output")


def make_data(data: str, output: Path, scale: float, held_out_scale: float) -> None:
    """train.jsonl and held_out.jsonl: the first rankings of each source on either side of the split."""
    prepare(["--config", str(CONFIG), "--run", str(output), "--data_dir", data])
    pick("rankings", times(TRAIN, scale), output, "train")
    pick("rankings_validation", times(HELD_OUT, held_out_scale), output, "held_out")
    shutil.copy(output / "data" / "demonstrations.jsonl", output)


def bring_data(args: argparse.Namespace, output: Path) -> None:
    """The user's own three files, the rankings to train on cut to the first `train_rankings`."""
    files = {"train": args.train_file, "held_out": args.held_out_file, "demonstrations": args.demonstrations_file}
    missing = [f"--{name}_file" for name, path in files.items() if path is None]
    if missing:
        raise UserError(f"give --data, or {' and '.join(missing)} too")
    for name, path in files.items():
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = lines[: args.train_rankings] if name == "train" else lines
        (output / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")


def times(counts: dict[str, int], scale: float) -> dict[str, int]:
    return {name: round(count * scale) for name, count in counts.items()}


def pick(name: str, counts: dict[str, int], output: Path, to: str) -> None:
    """The first rankings of each source, at most as many as `counts` says. Raises UserError where there is none."""
    kept, taken = [], Counter()
    for line in (output / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        taken[row["source"]] += 1
        if taken[row["source"]] <= counts[row["source"]]:
            kept.append(row)
    for source, count in counts.items():
        if count and not taken[source]:
            raise UserError(f"{output / 'data'}: {source} gives no {name}; raise its max_characters in {CONFIG}")
        print(f"{to}: {min(taken[source], count)} of {source}")
    write_jsonl(output / f"{to}.jsonl", kept)


def train_ours(args: argparse.Namespace, output: Path, seed: int) -> None:
    folder = output / f"model-ours-{seed}"
    settings = SETTINGS | {
        "bf16": "auto", "learning_rate": args.learning_rate, "num_train_epochs": args.epochs,
        "output_dir": folder, "overwrite_output_dir": True, "seed": seed, "model_name_or_path": args.model,
        "train_file": output / "train.jsonl", "validation_file": few(output),
        "demonstrations_file": output / "demonstrations.jsonl",
        "per_device_train_batch_size": args.prompts_a_pass,
        "gradient_accumulation_steps": args.prompts_a_step // args.prompts_a_pass,
        "per_device_eval_batch_size": 32, "max_length": 2048,
    }  # fmt: skip
    rm.main([f"--{key}={value}" for key, value in settings.items()])
    seconds = read_jsonl(folder / "timing.jsonl")[-1]["train_runtime"]  # without the stage's own scoring and report
    finish(output, "ours", seed, str(folder), seconds)


def few(output: Path) -> Path:
    """Some held-out rankings for the stage's own report; `finish` scores all of them, for both sides alike."""
    lines = (output / "held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (output / "few_held_out.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    return output / "few_held_out.jsonl"


def train_trl(settings: argparse.Namespace, output: Path, seed: int) -> None:
    """TRL's RewardTrainer on every untied pair; the same tokens, first weights and number of steps as ours."""
    from trl import RewardConfig, RewardTrainer

    tune_cpu()
    model = settings.model
    codec, folder = Codec.load(model), output / f"model-trl-{seed}"
    rankings = load_rankings(str(output / "train.jsonl"))[0]
    pairs = [pair_row(element["ranking"]) for element in split_pairs(encode_rankings(rankings, codec))]
    steps = math.ceil(len(rankings) / settings.prompts_a_step)
    passes = max(1, round(len(pairs) / steps / settings.pairs_a_pass))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = other_token(tokenizer)  # it would mask the EOS at which a score is read
    save_first_weights(model, folder / "start", codec, seed)
    start_model = AutoModelForSequenceClassification.from_pretrained(folder / "start", num_labels=1)
    start_model.config.pad_token_id = tokenizer.pad_token_id
    args = RewardConfig(
        **SETTINGS, learning_rate=settings.learning_rate, bf16=has_bf16(),
        output_dir=str(folder), seed=seed, num_train_epochs=1,
        per_device_train_batch_size=max(1, round(len(pairs) / steps / passes)), gradient_accumulation_steps=passes,
        max_length=None, weight_decay=0.0,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, save_strategy="no",
        gradient_checkpointing=False, report_to="none", use_cpu=not torch.cuda.is_available(), logging_steps=5,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=start_model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder))
    codec.save(folder)
    steps_taken = trainer.state.global_step
    finish(output, "trl", seed, str(folder), seconds, {"pairs": len(pairs), "steps": steps_taken})


def pair_row(ranking) -> dict[str, list[int]]:
    """A pair's tokens, in the trainer's names; the lower rank is the better."""
    better, worse = sorted(range(2), key=lambda i: ranking.ranks[i])
    query = list(ranking.query)
    return {
        "chosen_ids": query + list(ranking.responses[better]),
        "rejected_ids": query + list(ranking.responses[worse]),
    }


def other_token(tokenizer) -> str:
    return next(token for token in tokenizer.all_special_tokens if token not in (tokenizer.eos_token, None))


def save_first_weights(model: str, folder: Path, codec: Codec, seed: int) -> None:
    """The base with the very head that stage `rm` starts from with this seed."""
    set_seed(seed)
    save_scalar_model(load_scalar_model(model, fresh_head=True), folder, codec.pad_id)


def finish(output: Path, side: str, seed: int, folder: str, seconds: float, more: dict | None = None) -> None:
    """Score the held-out rankings, both sides by one code, and write the run's result last."""
    rankings = load_rankings(str(output / "held_out.jsonl"))[0]
    scores = [row for _, row in score_rankings(load_scalar_model(folder).eval(), rankings, Codec.load(folder), 32)]
    write_json(output / f"{side}-{seed}.json", {"seconds": seconds, "scores": scores, **(more or {})})


def report(output: Path, args: argparse.Namespace) -> dict:
    rankings = load_rankings(str(output / "held_out.jsonl"))[0]
    training = load_rankings(str(output / "train.jsonl"))[0]
    runs = {
        side: [json.loads((output / f"{side}-{seed}.json").read_text()) for seed in range(args.seeds)] for side in SIDES
    }
    groups = {"all": rankings, "k_over_2": [r for r in rankings if len(r.ranks) > 2]}
    ranked = [r for r in rankings if len(set(r.ranks)) > 1 and args.group_by in r.columns]
    names = sorted({str(r.columns[args.group_by]) for r in ranked})
    groups |= {name: [r for r in rankings if str(r.columns.get(args.group_by)) == name] for name in names}
    return {
        "model": args.model,
        "seeds": args.seeds,
        "settings": SETTINGS | {"learning_rate": args.learning_rate},  # the same for both sides
        "epochs": {"ours": args.epochs, "trl": 1.0},
        "training": {
            "prompts": distinct(training),
            "pairs": len(untied_pairs([(r, [0.0] * len(r.ranks)) for r in training])),
        },
        "seconds": {side: [run["seconds"] for run in found] for side, found in runs.items()},
        "held_out": {name: compare(rankings, runs, rows) for name, rows in groups.items() if rows}
        | {"by_prompt": by_prompt(rankings, runs)}
        | ({"macro": macro(rankings, runs, [groups[name] for name in names])} if names else {}),
    }


def distinct(rankings: list[Ranking]) -> int:
    return len({prompt_key(ranking.prompt) for ranking in rankings})


@dataclass(frozen=True)
class Right:
    """What both sides got right of a group's untied pairs."""

    pairs: list
    by_seed: dict[str, np.ndarray]  # side -> (S, m) in [0, 1]
    prompts: np.ndarray  # (m,) cluster of each pair


def judge(rankings: list[Ranking], runs: dict[str, list[dict]], group: list[Ranking]) -> Right:
    chosen, by_seed = {id(ranking) for ranking in group}, {}
    for side, found in runs.items():
        seeds = []
        for run in found:
            scored = [(r, s) for r, s in zip(rankings, run["scores"], strict=True) if id(r) in chosen]
            pairs = untied_pairs(scored)
            seeds.append(right(pairs))
        by_seed[side] = np.array(seeds, dtype=float)
    return Right(pairs, by_seed, np.unique(prompts_of(pairs), return_inverse=True)[1])


def compare(rankings: list[Ranking], runs: dict[str, list[dict]], group: list[Ranking]) -> dict:
    """Accuracy of both sides on the pairs of `group`, each pair's averaged over seeds, and their difference."""
    found = judge(rankings, runs, group)
    longer = (np.sign([a - b for a, b in (pair.lengths for pair in found.pairs)]) + 1) / 2
    return plain(
        {
            "pairs": len(found.pairs),
            "prompts": distinct(group),
            **resampled([found]),
            "by_seed": {side: seeds.mean(axis=1).tolist() for side, seeds in found.by_seed.items()},
            "length_only": accuracy_interval(longer, found.prompts, 0),
            "gain_over_length": accuracy_gain(found.by_seed["ours"].mean(axis=0), longer, found.prompts, 0),
        }
    )


def by_prompt(rankings: list[Ranking], runs: dict[str, list[dict]]) -> dict:
    """Each prompt alike, as in the loss over whole rankings; over pairs, as in the other rows and in TRL's loss, one
    with 9 answers counts 36 times one with 2."""
    found = judge(rankings, runs, rankings)
    trials = np.bincount(found.prompts)
    shares = {
        side: np.array([np.bincount(found.prompts, weights=one) / trials for one in seeds])
        for side, seeds in found.by_seed.items()
    }
    one_each = Right([], shares, np.arange(len(trials)))
    return plain({"pairs": len(found.pairs), "prompts": len(trials), **resampled([one_each])})


def macro(rankings: list[Ranking], runs: dict[str, list[dict]], groups: list[list[Ranking]]) -> dict:
    """The mean over groups of both sides' accuracy, so that the group with the most pairs does not decide."""
    found = [judge(rankings, runs, group) for group in groups]
    pairs, prompts = sum(len(one.pairs) for one in found), sum(distinct(group) for group in groups)
    return plain({"pairs": pairs, "prompts": prompts, **resampled(found)})


def resampled(groups: list[Right]) -> dict[str, Interval]:
    """Mean over groups of each side's accuracy, and of ours less TRL's, with a percentile bootstrap of two levels:
    S seeds, the same for both sides (they share the first head), and of each group its prompts, whole."""
    rng = np.random.default_rng(0)
    seeds = len(groups[0].by_seed["ours"])
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds  # (R, S)
    draws: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    means: dict[str, list[float]] = {side: [] for side in SIDES}
    for group in groups:
        trials = np.bincount(group.prompts)
        n = len(trials)
        drawn = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)  # (R, n)
        for side in SIDES:
            gained = np.array([np.bincount(group.prompts, weights=one) for one in group.by_seed[side]])  # (S, n)
            draws[side].append(((drawn_seeds @ gained) * drawn).sum(axis=1) / (drawn @ trials))
            means[side].append(float(group.by_seed[side].mean()))
    spread = {side: np.mean(found, axis=0) for side, found in draws.items()}
    middle = {side: float(np.mean(found)) for side, found in means.items()}
    spread["difference"] = spread["ours"] - spread["trl"]
    middle["difference"] = middle["ours"] - middle["trl"]
    ends = {name: np.quantile(found, (0.025, 0.975)) for name, found in spread.items()}
    return {
        name: Interval(mean, min(float(ends[name][0]), mean), max(float(ends[name][1]), mean))
        for name, mean in middle.items()
    }


def print_table(results: dict) -> None:
    def show(interval: dict[str, float]) -> str:
        return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"

    print("| held-out pairs | ours | TRL | ours - TRL | the longer is better |\n|---|---|---|---|---|")
    for name, row in results["held_out"].items():
        cells = " | ".join(show(row[key]) if key in row else "-" for key in (*SIDES, "difference", "length_only"))
        print(f"| {name} ({row['pairs']}) | {cells} |")
    seconds = {side: round(sum(found)) for side, found in results["seconds"].items()}
    print(f"trained on {results['training']} at one learning rate, {results['settings']['learning_rate']:g}")
    print(f"{results['seeds']} seeds; seconds {seconds}")


if __name__ == "__main__":
    main(sys.argv[1:])
