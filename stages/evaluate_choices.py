"""What alignment cost, and what it left as it was (paper section 4.2, App. D): multiple choice, pairs of sentences.

    accuracy of every policy's most likely choice, length-normalised, beside chance; of pairs the entropy in bits
    gains over SFT on the same rows, all with 95% intervals

Nothing is sampled and no judge is asked. Writes choices.json, choices.md and weighed.jsonl (no text).

    python -m stages evaluate choices --config configs/smollm2/evaluate_choices.yaml --run runs/smollm2
"""

import sys
from pathlib import Path

from align.config import EvaluateChoicesConfig
from align.data import load_choices
from align.errors import UserError
from align.evaluate.choices import choices_report, shown, weigh, write_markdown
from align.evaluate.policies import load_evaluated, policy_paths
from align.files import plain, write_json, write_jsonl
from align.lengths import choice_lengths, drop_long
from align.manifest import check_parent
from align.models import row_limit
from align.order import evenly
from align.parse import parse
from align.rows import DataReport
from align.runtime import Runtime, is_main_process, tune_cpu
from align.text import Codec
from align.track import announce
from align.types import Choice
from align.validate import say_training_leaks
from stages.__main__ import run


def main(argv: list[str]) -> None:
    # 1. Config, checkpoints, rows.
    config = parse(EvaluateChoicesConfig, argv)
    tune_cpu()
    check_parent(config.sft_path, "sft_path", ("sft",))
    codec = Codec.load(config.sft_path)
    paths = {name: path for name, path in policy_paths(config, codec).items() if path}
    output = Path(config.output_dir)
    if (output / "choices.json").exists() and not config.overwrite_output_dir:
        raise UserError(f"output_dir: {output} holds a report; choose another, or set overwrite_output_dir: true")
    rows, data = load_rows(config, codec)
    say_training_leaks(list(paths.values()), [row for row in rows if row.prompt is not None])

    # 2. Every policy weighs every choice.
    runtime, weighed = Runtime(config.seed, config.bf16), {}
    for name, path in paths.items():
        announce(f"evaluating {name}")
        policy = None  # one at a time
        policy = load_evaluated(path, config, runtime)
        with runtime.autocast():
            weighed[name] = weigh(policy, rows, codec, config.per_device_batch_size)

    # 3. Report.
    report = choices_report(rows, weighed)
    if is_main_process():
        about = ("id", "source")
        numbers = [{name: row.columns.get(name) for name in about} | {"right": row.right} for row in rows]
        numbers = [n | {name: plain(w[i]) for name, w in weighed.items()} for i, n in enumerate(numbers)]
        write_json(output / "choices.json", {"groups": plain(report), "models": paths, "data": data.as_dict()})
        write_jsonl(output / "weighed.jsonl", numbers)
        write_markdown(output / "choices.md", report)
    for group, found in report.items():
        for name, measured in found["policies"].items():
            kind = "accuracy" if "accuracy" in measured else "entropy"
            announce(f"{group}: {name}: {kind} {shown(measured[kind])}, over SFT {shown(measured['gain_vs_sft'])}")
    announce(f"report in {output / 'choices.md'}")


def load_rows(config: EvaluateChoicesConfig, codec: Codec) -> tuple[list[Choice], DataReport]:
    """Rows that the models can read, of each source at most `num_rows`, and what was read and dropped."""
    limit = row_limit(config.sft_path, "max_length", config.max_length)
    read, report = load_choices(config.choices_file, config.on_bad_rows)
    rows, report = drop_long(read, codec, limit, report, choice_lengths)
    if len(rows) < len(read):
        announce(f"choices_file: {len(read) - len(rows)} of {len(read)} rows over {limit} tokens left out")
    sources: dict[str | None, list[Choice]] = {}
    for row in rows:
        sources.setdefault(row.columns.get("source"), []).append(row)
    rows = [row for own in sources.values() for row in evenly(own, config.num_rows)]
    if len(rows) < 2:
        raise UserError(f"choices_file: {len(rows)} row that can be used; an interval needs 2 or more")
    return rows, report


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
