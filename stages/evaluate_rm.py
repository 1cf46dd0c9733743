"""A reward model on rankings that it never saw: is it right, calibrated, and more than a ruler?

    accuracy with 95% intervals, by K, rank distance, length, source, language, labeler; calibration (Bradley-Terry);
    length-only and random baselines; a peer on the same pairs; the labelers' agreement, which bounds what is possible

Any sequence classifier with one label will do, ours or another's. Writes report.json, report.md, pictures, scores.jsonl
and mistakes.md, whose texts go nowhere else. Nothing else in the folder is touched: it may be the model's own.

    python -m stages evaluate rm --config configs/tiny/evaluate_rm.yaml --run runs/tiny
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from align.config import EvaluateRMConfig
from align.data import load_rankings
from align.errors import UserError
from align.evaluate.people import labelers_report
from align.evaluate.plots import plot_calibration, plot_overfitting, plot_reward_accuracy
from align.evaluate.reward_report import ranking_accuracy, require_scores
from align.evaluate.rm_report import (
    compare,
    read_scores,
    scores_row,
    transfer,
    worst_mistakes,
    write_markdown,
)
from align.evaluate.scorer import Scorer, load_scorer, score_spread
from align.files import plain, write_json, write_jsonl
from align.manifest import check_parent, read_manifest
from align.parse import parse
from align.runtime import Runtime, is_main_process, tune_cpu
from align.splits import keep_apart
from align.track import announce, read_jsonl
from align.validate import say_training_leaks
from stages.__main__ import run


def main(argv: list[str]) -> None:
    # 1. Config, model, rankings that it did not learn from.
    config = parse(EvaluateRMConfig, argv)
    tune_cpu()
    check_parent(config.reward_model_path, "reward_model_path", ("rm",))
    output = Path(config.output_dir)
    if (output / "report.md").exists() and not config.overwrite_output_dir:
        raise UserError(f"output_dir: {output} holds a report; choose another, or set overwrite_output_dir: true")
    trained = load_rankings(config.train_file, config.on_bad_rows)[0] if config.train_file else []
    rankings, data = load_held_out(config.rankings_file, "rankings_file", trained, config)
    say_training_leaks([config.reward_model_path], rankings)
    device = Runtime(config.seed).device
    scorer = load(config.reward_model_path, "reward_model_path", device, config)

    # 2. Scores: ours of all rankings (None: too long), then what else was asked for.
    scores = score(scorer, rankings, "reward_model_path", config)
    scored = [(r, s) for r, s in zip(rankings, scores, strict=True) if s is not None]
    if not scored:
        raise UserError(f"rankings_file: every ranking is over {config.max_length} tokens; raise max_length")
    sample = [ranking for ranking, _ in scored][: config.num_spread_prompts]
    spread = score_spread(scorer, sample, config.per_device_batch_size, config.seed) if sample else None
    unseen = held_out_labelers(scorer, trained, config)
    del scorer
    peer = peer_report(rankings, scores, device, config)

    # 3. The report.
    report = ranking_accuracy(scored, config.seed) | {
        "schema": 1,
        "model": config.reward_model_path,
        "data": data.with_dropped("too_long", len(rankings) - len(scored)).as_dict(),
        "labelers": labelers_report(scored, config.seed),
        "held_out_labelers": unseen,
        "transfer": transfer(scored, trained, config.seed),
        "peer": peer,
        "score_spread": spread,
        "folds": {"labeler": folds(config.labeler_folds_file), "source": folds(config.source_folds_file)},
    }
    report["demonstration_mean"] = demonstration_mean(config.reward_model_path)

    # 4. Write.
    if is_main_process():
        write_all(output, plain(report), config)
        write_jsonl(output / "scores.jsonl", [scores_row(r, s) for r, s in zip(rankings, scores, strict=True)])
        (output / "mistakes.md").write_text(worst_mistakes(scored, config.num_mistakes), encoding="utf-8")
    announce(f"accuracy {report['accuracy']} on {report['pairs']} pairs; report in {output / 'report.md'}")


def load_held_out(path: str, role: str, trained: list, config: EvaluateRMConfig) -> tuple[list, Any]:
    """Rankings of prompts that were not trained on; others stop the run, or are dropped and counted."""
    if not path:
        raise UserError(f"{role}: missing; give held-out rankings, e.g. those that collect writes")
    rankings, report = load_rankings(path, config.on_bad_rows)
    return keep_apart(rankings, report, trained, config.on_bad_rows) if trained else (rankings, report)


def load(path: str, role: str, device: torch.device, config: EvaluateRMConfig) -> Scorer:
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return load_scorer(path, role, device, config.attn_implementation, dtype)


def score(scorer: Scorer, rankings: list, role: str, config: EvaluateRMConfig) -> list[list[float] | None]:
    """K scores of each ranking, None where it is over max_length or what the model can read."""
    longest = min(config.max_length, scorer.context or config.max_length)
    fits = [scorer.tokens(ranking) <= longest for ranking in rankings]
    found = scorer.score([r for r, ok in zip(rankings, fits, strict=True) if ok], config.per_device_batch_size)
    require_scores(found, role)
    rows = iter(found)
    return [next(rows) if ok else None for ok in fits]


def held_out_labelers(scorer: Scorer, trained: list, config: EvaluateRMConfig) -> dict[str, Any] | None:
    if not config.held_out_file:
        return None
    rankings, _ = load_held_out(config.held_out_file, "held_out_file", trained, config)
    known = {ranking.labeler for ranking in trained} & {ranking.labeler for ranking in rankings} - {None}
    if known:
        announce(f"held_out_file: {', '.join(sorted(known))} ranked in train_file too, so are not unseen")
    scores = score(scorer, rankings, "reward_model_path", config)
    scored = [(r, s) for r, s in zip(rankings, scores, strict=True) if s is not None]
    if len(scored) < len(rankings):
        announce(f"held_out_file: {len(rankings) - len(scored)} of {len(rankings)} rankings are too long, left out")
    if not scored:
        return None
    return ranking_accuracy(scored, config.seed) | {"labelers": labelers_report(scored, config.seed)}


def peer_report(rankings: list, scores: list, device: torch.device, config: EvaluateRMConfig) -> dict[str, Any] | None:
    """The second model, or its scores, on what ours has scored."""
    name = config.peer_model_path or config.peer_scores_file
    if not name:
        return None
    if config.peer_model_path:
        check_parent(config.peer_model_path, "peer_model_path", ("rm",))
        peer = load(config.peer_model_path, "peer_model_path", device, config)
        theirs = score(peer, rankings, "peer_model_path", config)
    else:
        theirs = read_scores(config.peer_scores_file, rankings)
    both = [(r, mine, other) for r, mine, other in zip(rankings, scores, theirs, strict=True) if mine is not None]
    return compare(name, [(r, mine) for r, mine, _ in both], [other for _, _, other in both], config.seed)


def folds(path: str | None) -> dict[str, Any] | None:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if path and Path(path).exists() else None
    except ValueError:
        raise UserError(f"{path}: is no JSON; run `rm` with folds_by again") from None


def demonstration_mean(path: str) -> float | None:
    manifest = read_manifest(path)
    return manifest.metrics.get("demonstration_mean") if manifest else None


def write_all(output: Path, report: dict[str, Any], config: EvaluateRMConfig) -> None:
    write_json(output / "report.json", report)  # first: it says in one line what is wrong with the folder
    plots = {
        "Accuracy": plot_reward_accuracy(report, output / "accuracy.png"),
        "Calibration": plot_calibration(report, output / "calibration.png"),
    }
    logs = [read_jsonl(path) if path else [] for path in (config.ranking_metrics_file, config.pair_metrics_file)]
    if any(logs):
        plots["Overfitting"] = plot_overfitting(*logs, output / "overfitting.png")
    write_markdown(output, report, plots)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
