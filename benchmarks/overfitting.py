"""Do shuffled pairs overfit sooner than whole rankings (paper section 3.5)? Three epochs on qa-feedback, K = 4.

    python -m benchmarks.overfitting --data FOLDER --model MODEL --output runs/overfitting

Stage `rm` twice, with `batch_element: ranking` and `pair`, one seed and one learning rate, as many optimiser steps an
epoch to within a few; held-out loss and accuracy after each epoch. A side that is done is not run again, so give
another --output with other arguments. Writes overfitting.png and results.json.
"""

import argparse
import math
import sys
from pathlib import Path

from align.data import load_rankings
from align.evaluate.plots import plot_overfitting
from align.evaluate.reward_report import untied_pairs
from align.files import write_json
from align.prepare import main as prepare
from align.track import read_jsonl
from benchmarks.reward_quality import CONFIG, pick
from stages.__main__ import main as align

PROMPTS_A_STEP, EPOCHS = 8, 3
PROMPTS_A_PASS, PAIRS_A_PASS = 4, 6  # of one forward and backward; as many passes a step as it takes
METRICS = ("epoch", "eval_loss", "eval_accuracy")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.overfitting", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder laid out as docs/benchmarks.md says")
    parser.add_argument("--model", required=True, help="folder of the base model or of an SFT model")
    parser.add_argument("--output", default="runs/overfitting")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--prompts", type=int, default=96, help="to train on")
    parser.add_argument("--held_out", type=int, default=150, help="prompts that loss and accuracy are measured on")
    parser.add_argument("--element", choices=("ranking", "pair"), help="one side alone")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if not (output / "train.jsonl").exists():
        make_data(args, output)
    for element in (args.element,) if args.element else ("ranking", "pair"):
        if not (output / element / "manifest.json").exists():
            train(element, args, output)
    rows = {element: read_jsonl(output / element / "metrics.jsonl") for element in ("ranking", "pair")}
    plot_overfitting(rows["ranking"], rows["pair"], output / "overfitting.png")
    measured = {
        name: [{key: row[key] for key in METRICS} for row in found if "eval_loss" in row]
        for name, found in rows.items()
    }
    write_json(output / "results.json", {"model": args.model, "learning_rate": args.learning_rate, **measured})
    for element, found in measured.items():
        for row in found:
            print(
                f"{element}: epoch {row['epoch']:.2f}: loss {row['eval_loss']:.4f}, accuracy {row['eval_accuracy']:.4f}"
            )
    print(f"plot in {output / 'overfitting.png'}")


def make_data(args: argparse.Namespace, output: Path) -> None:
    prepare(["--config", str(CONFIG), "--run", str(output), "--data_dir", args.data])
    others = {"en_100_tree": 0, "harmless-base-test": 0}
    pick("rankings_validation", others | {"dev_feedback": args.held_out}, output, "held_out")
    pick("rankings", others | {"dev_feedback": args.prompts}, output, "train")


def train(element: str, args: argparse.Namespace, output: Path) -> None:
    """Both sides take a step after about as many comparisons: a prompt's K-wise element holds all of its pairs."""
    rankings = load_rankings(str(output / "train.jsonl"))[0]
    pairs = len(untied_pairs([(ranking, [0.0] * len(ranking.ranks)) for ranking in rankings]))
    steps = math.ceil(len(rankings) / PROMPTS_A_STEP)
    passes = round(pairs / steps / PAIRS_A_PASS)
    pair_steps = math.ceil(pairs / (passes * PAIRS_A_PASS))  # a step or two more or fewer
    settings = {
        "output_dir": output / element, "overwrite_output_dir": True, "model_name_or_path": args.model,
        "train_file": output / "train.jsonl", "validation_file": output / "held_out.jsonl",
        "demonstrations_file": output / "data" / "demonstrations.jsonl", "batch_element": element,
        "num_train_epochs": EPOCHS, "learning_rate": args.learning_rate, "bf16": "auto", "logging_steps": 2,
        "per_device_train_batch_size": PROMPTS_A_PASS if element == "ranking" else PAIRS_A_PASS,
        "gradient_accumulation_steps": PROMPTS_A_STEP // PROMPTS_A_PASS if element == "ranking" else passes,
        "per_device_eval_batch_size": 32, "eval_steps": steps if element == "ranking" else pair_steps,
    }  # fmt: skip
    code = align(["rm", *(f"--{key}={value}" for key, value in settings.items())])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
