"""Everything a run shows, from plain dicts: Markdown tables, transcripts side by side, and one static HTML page.

An evaluation is {"preset", "temperature", "policies": {name: {"sampled": [record], "greedy": [record], "perplexity"}
or null}, "rm", "labelers", "seconds", "step_zero", "transcripts", "best_of_n"}; a record is one answer: {"id",
"prompt", "response", "use_case", "language", "constraint", "likert", "fields": {name: bool}, "finished",
"response_tokens", "proxy", "kl"}.
A transcript is {"id", "prompt", "use_case", "language", "constraint", "responses": {policy: record}}.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align.evaluate.plots import (
    LABELS,
    plot_best_of_n,
    plot_calibration,
    plot_overoptimisation,
    plot_policies,
    plot_sft,
    plot_training,
    plot_use_cases,
)
from align.evaluate.schema import MODES, POLICIES, REWARD_KEYS
from align.evaluate.summary import Record, summarise
from align.evaluate.win_rate import Interval, mean_interval, rate_interval

NUM_TRANSCRIPTS = 20
WARNING = "Prompts and answers stand as data and models gave them and may offend."
TEMPLATE = "report.html.jinja"
NO_VALUE = "-"


@dataclass(frozen=True)
class Table:
    """A titled table of text; `note` says what its numbers are. The first column is the row's name."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(_cell(c) for c in row) + " |" for row in (self.header, *self.rows)]
        rule = "|---" + "|---:" * (len(self.header) - 1) + "|"
        return "\n".join([f"### {self.title}", "", self.note, "", lines[0], rule, *lines[1:]])


def tables(evaluation: Mapping[str, Any], summary: Mapping[str, Any] | None = None) -> list[Table]:
    """The tables of a run: policies, gold by use case and by language, the judge's fields, the reward model.

    Without a judge the reward model's view of the policies, and its score by source and by language.
    """
    summary, found = summary or summarise(evaluation), evaluation.get("best_of_n")
    rewards = [_best_of_table(found)] if found else []
    rewards += [_reward_table(summary)] if summary["rm"] else []
    drawn = f"Sampled answers are drawn at temperature {evaluation.get('temperature', 1.0):g}, greedy ones at 0."
    if "by_reward_model" in summary:
        return [
            _proxy_table(summary, drawn),
            _mean_by(evaluation, "source", "proxy", "Reward model's score by source of the prompt"),
            _mean_by(evaluation, "language", "proxy", "Reward model's score by language"),
            *rewards,
        ]
    return [
        _policies_table(summary, drawn),
        _mean_by(evaluation, "use_case", "likert", "Gold score by use case"),
        _mean_by(evaluation, "language", "likert", "Gold score by language"),
        _fields_table(evaluation),
        *rewards,
    ]


def write_tables(evaluation: Mapping[str, Any], summary: Mapping[str, Any] | None = None) -> str:
    """All tables as Markdown."""
    return "\n\n".join(table.markdown() for table in tables(evaluation, summary)) + "\n"


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """Whether each PPO policy is better than SFT, in one sentence each: the interval of the paired gain decides.

    Without a judge: whether the reward model, which PPO climbed, says so.
    """
    lines, unjudged = [], summary.get("by_reward_model")
    for name in ("ppo", "ppo_ptx"):
        for mode in MODES if summary["policies"][name] else ():
            numbers = (unjudged or summary["policies"])[name][mode]
            gain, rate = Interval(**numbers["gain_vs_sft"]), Interval(**numbers["win_rate_vs_sft"])
            if gain.low == gain.high:  # all prompts alike: no spread to judge it by
                verdict = "does not differ measurably from SFT"
            elif gain.low > 0:
                verdict = "is better than SFT"
            else:
                verdict = "is worse than SFT" if gain.high < 0 else "does not differ measurably from SFT"
            who = " by the reward model that it climbed" if unjudged else ""
            size = f" ({Interval(**numbers['gain_in_deviations'])} standard deviations)" if unjudged else ""
            lines.append(f"{LABELS[name]}, {mode}, {verdict}{who}: paired gain {gain}{size}, win rate {rate}.")
    return lines


def best_of_verdicts(found: Mapping[str, Any]) -> list[str]:
    """Each PPO policy beside SFT's best of n at the nearest KL: a sentence by the reward model, one by the judge."""
    lines = []
    for name, beside in found["policies"].items():
        for key, who in (("proxy", "the reward model"), ("gold", "the judge")):
            numbers = beside[key]
            if numbers is None:
                continue
            ours, best, gain, n = (numbers[part] for part in ("score", "best_of", "gain", "matched_by"))
            reach = f"best of {n} scores as much" if n else f"no n up to {found['samples']} scores as much"
            if beside["kl"].low > found["curve"][-1]["kl"]:
                reach += f"; it is further from SFT than best of {found['samples']} can be"
            lines.append(
                f"{LABELS[name]} at {beside['kl'].mean:.2f} nats scores {ours.mean:.2f} by {who}, SFT's best of "
                f"{beside['n']} (at most {beside['kl_of_n']:.2f} nats) {best.mean:.2f}: paired gain {gain}; {reach}."
            )
    return lines


def shown(transcripts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most NUM_TRANSCRIPTS, evenly spaced: they lie in the file's order, source by source."""
    count = min(len(transcripts), NUM_TRANSCRIPTS)
    return [transcripts[i * len(transcripts) // count] for i in range(count)]


def pick_transcripts(
    evaluation: Mapping[str, Any], n: int, seed: int = 0, mode: str = "sampled"
) -> list[dict[str, Any]]:
    """n prompts with every trained policy's answer, drawn evenly over the use cases, in the evaluation's order."""
    policies = _trained(evaluation)
    records = policies["sft"][mode]
    by_case: dict[str, list[int]] = {}
    for i in np.random.default_rng(seed).permutation(len(records)):
        by_case.setdefault(str(records[i].get("use_case") or records[i].get("source")), []).append(int(i))
    # the first of every use case (or source), then the second of every one, ...
    turns = sorted((turn, case, i) for case, rows in by_case.items() for turn, i in enumerate(rows))
    chosen = sorted(i for _, _, i in turns[:n])
    shared = ("id", "prompt", "use_case", "source", "language", "constraint")
    return [
        {key: records[i].get(key) for key in shared}
        | {"responses": {name: policy[mode][i] for name, policy in policies.items()}}
        for i in chosen
    ]


def transcripts_table(rows: Sequence[Mapping[str, Any]], policies: Sequence[str], n: int) -> str:
    """The first n transcripts as a Markdown table: a prompt a row, a policy a column, gold scores before the texts."""
    header = ["prompt", *(LABELS.get(name, name) for name in policies)]
    body = [
        [shown_prompt(row["prompt"]), *(_answer(row["responses"].get(name)) for name in policies)] for row in rows[:n]
    ]
    note = f"The gold score (1 to 7), or where nobody judged the reward model's, stands before each answer. {WARNING}"
    return Table("Transcripts", note, header, body).markdown() + "\n"


def write_plots(
    folder: Path,
    evaluation: Mapping[str, Any],
    summary: Mapping[str, Any],
    training: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    sft: Sequence[Mapping[str, Any]] = (),
    overoptimisation: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Path]:
    """Every plot that has data, written into `folder`, as caption -> file for `write_report`.

    `training` holds the rows of metrics.jsonl for each PPO policy, `sft` those of the SFT run.
    """
    folder = Path(folder)
    unjudged = "by_reward_model" in summary
    caption = f"{'Score by the reward model' if unjudged else 'Gold score'} of each policy"
    plots = {caption: plot_policies(summary, folder / "policies.png")}
    for name in ("ppo_ptx", "ppo"):
        if evaluation["policies"].get(name) and not unjudged:
            caption = f"Gold score by use case, {LABELS[name]} and SFT"
            plots[caption] = plot_use_cases(evaluation, folder / f"use_cases_{name}.png", name)
        if (training or {}).get(name):
            plots[f"Training of {LABELS[name]}"] = plot_training(training[name], folder / f"training_{name}.png", name)
    if evaluation.get("best_of_n"):
        plots["SFT's best of n beside PPO"] = plot_best_of_n(evaluation["best_of_n"], folder / "best_of_n.png")
    if evaluation["rm"] and evaluation["rm"].get("calibration"):
        plots["Calibration of the reward model"] = plot_calibration(evaluation["rm"], folder / "calibration.png")
    if sft:
        plots["Training of SFT"] = plot_sft(sft, folder / "sft.png")
    if overoptimisation:
        plots["Proxy and gold over a run"] = plot_overoptimisation(overoptimisation, folder / "overoptimisation.png")
    return plots


def write_report(
    folder: Path,
    evaluation: Mapping[str, Any],
    plots: Mapping[str, Path],
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write folder/index.html and folder/report.md; plots are caption -> PNG file. Returns the HTML file.

    The page needs no network and no script; images are relative. All text is escaped: a response is untrusted.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = summary or summarise(evaluation)
    names = list(_trained(evaluation))
    rows = shown(evaluation.get("transcripts") or pick_transcripts(evaluation, NUM_TRANSCRIPTS))
    images = {caption: Path(os.path.relpath(path, folder)).as_posix() for caption, path in plots.items()}
    found, lines = tables(evaluation, summary), verdicts(summary)
    lines += best_of_verdicts(evaluation["best_of_n"]) if evaluation.get("best_of_n") else []
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = env.get_template(TEMPLATE).render(
        preset=summary["preset"],
        verdicts=lines,
        tables=found,
        images=images,
        transcripts=rows,
        policies=names,
        labels=LABELS,
        warning=WARNING,
        score=_score,
        shown_prompt=shown_prompt,
        seconds={k: v for k, v in summary["seconds"].items() if v is not None},
        num_prompts=len(evaluation["policies"]["sft"]["sampled"]),
    )
    index = folder / "index.html"
    index.write_text(page, encoding="utf-8")
    parts = [
        f"# Evaluation of preset {summary['preset']}",
        "\n".join(f"- {line}" for line in lines) or "No policy was trained with PPO.",
        *(table.markdown() for table in found),
        *(f"![{caption}]({image})" for caption, image in images.items()),
        transcripts_table(rows, names, NUM_TRANSCRIPTS),
    ]
    (folder / "report.md").write_text("\n\n".join(parts), encoding="utf-8")
    return index


def _policies_table(summary: Mapping[str, Any], drawn: str) -> Table:
    rows = []
    for name in POLICIES:
        policy = summary["policies"][name]
        if policy is None:
            continue
        row = [LABELS[name]]
        for mode in MODES:
            row += [str(Interval(**policy[mode][key])) for key in ("gold", "gain_vs_sft", "win_rate_vs_sft")]
        row += [_number(policy[key]) for key in ("proxy", "kl", "perplexity")]
        rows.append([*row, f"{policy['response_tokens']:.1f}", f"{policy['finished']:.1%}"])
    columns = [f"{mode}: {what}" for mode in MODES for what in ("gold", "gain", "win rate")]
    note = (
        "Gold: mean Likert 1 to 7 by the judge. Gain and win rate (ties half) against SFT on the same prompts. "
        f"Brackets: 95% intervals. {drawn} Proxy (reward model score), KL to "
        "SFT (nats per episode), tokens and finished (ends in EOS) are means over the sampled answers."
    )
    return Table("Policies", note, ["policy", *columns, "proxy", "KL", "perplexity", "tokens", "finished"], rows)


def _proxy_table(summary: Mapping[str, Any], drawn: str) -> Table:
    """What the reward model and plain counts say of each policy's answers."""
    rows = []
    for name, modes in summary["by_reward_model"].items():
        ratio = modes["perplexity_vs_sft"]
        perplexity = NO_VALUE if ratio is None else f"{summary['policies'][name]['perplexity']:.2f} ({ratio:.3f})"
        for mode in MODES:
            cells = [str(Interval(**modes[mode][key])) if modes[mode][key] else "-" for key in REWARD_KEYS]
            rows.append([f"{LABELS[name]}, {mode}", *cells, perplexity])
    columns = [
        "score", "gain", "gain / sd", "win rate", "KL", "tokens", "finished", "finished: gain", "repetition",
        "perplexity (/ SFT's)",
    ]  # fmt: skip
    note = (
        "No judge: score is the reward model's, which PPO climbed, so a gain says that it climbed. Gains and win rate "
        "(ties half) against SFT on the same prompts; gain / sd in standard deviations of SFT's scores. KL to SFT in "
        "nats per episode, of sampled answers; finished ends in EOS; repetition is the share of 3-grams that stood "
        f"before; perplexity is on held-out text. {drawn} Brackets: 95% intervals."
    )
    return Table("Policies by the reward model", note, ["policy", *columns], rows)


def _mean_by(evaluation: Mapping[str, Any], column: str, key: str, title: str) -> Table:
    """Mean of a number of the sampled answers, a row for each value of `column`, a column for each trained policy."""
    policies = _trained(evaluation)
    groups: dict[str, dict[str, list[float]]] = {}
    for name, policy in policies.items():
        for record in policy["sampled"]:
            cells = groups.setdefault(str(record.get(column) or "unknown"), {})
            cells.setdefault(name, []).append(float(record[key]))
    rows = []
    for value, cells in sorted(groups.items()):
        prompts = max(len(golds) for golds in cells.values())
        rows.append([value, str(prompts), *(_mean_cell(cells.get(name, [])) for name in policies)])
    header = [column.replace("_", " "), "prompts", *(LABELS[name] for name in policies)]
    what = "Likert" if key == "likert" else "score"
    return Table(title, f"Mean {what} of sampled answers, with 95% intervals.", header, rows)


def _fields_table(evaluation: Mapping[str, Any]) -> Table:
    """Share of sampled answers for which the judge says yes, a row for each field of the paper's Table 3."""
    policies = _trained(evaluation)
    fields = dict.fromkeys(f for p in policies.values() for r in p["sampled"] for f in r.get("fields") or {})
    rows = []
    for field in fields:
        answers = {n: [r["fields"][field] for r in p["sampled"] if _asked(r, field)] for n, p in policies.items()}
        cells = [str(rate_interval(sum(a), len(a))) if a else NO_VALUE for a in answers.values()]
        rows.append([field.replace("_", " "), *cells])
    note = "Share of sampled answers for which the judge says yes, of those where the question applies."
    return Table("The judge's yes/no fields", note, ["field", *(LABELS[name] for name in policies)], rows)


def _best_of_table(found: Mapping[str, Any]) -> Table:
    columns = [key for key in ("proxy", "gold") if key in found["scores"]]
    rows = [
        [f"SFT, best of {row['n']}", f"{row['kl']:.2f}", *(str(row[key]) for key in columns)] for row in found["curve"]
    ]
    for name, beside in found["policies"].items():
        rows.append([LABELS[name], str(beside["kl"]), *(str(beside[key]["score"]) for key in columns)])
    laws = [f"{key} {_law(found['laws'][key])}" for key in columns if found["laws"][key]]
    fitted = (
        f" Fitted to the gain over best of 1, R = d (alpha - beta d), d = sqrt(KL): {'; '.join(laws)}." if laws else ""
    )
    note = (
        f"SFT answered {found['prompts']} prompts {found['samples']} times; best of n is the one of n answers that the "
        "reward model likes best. Its KL: ln n - (n - 1) / n nats, less where answers are equal or tie. Brackets: 95% "
        f"intervals over prompts.{fitted}"
    )
    return Table("SFT's best of n beside PPO", note, ["policy", "KL", *columns], rows)


def _law(law: Mapping[str, float | None]) -> str:
    peak = "never peaks" if law["peak_kl"] is None else f"peaks at {law['peak_kl']:.2f} nats"
    return f"alpha {law['alpha']:.2f}, beta {law['beta']:.2f}, {peak}"


def _reward_table(summary: Mapping[str, Any]) -> Table:
    rm, agreement = summary["rm"], summary["labelers"]["agreement"]
    zero = rm["demonstration_mean"]
    rows = [
        ["accuracy against labelers", str(Interval(**rm["accuracy"]))],
        ["accuracy against gold", str(Interval(**rm["gold_accuracy"])) if rm["gold_accuracy"] else NO_VALUE],
        ["agreement of two labelers", str(Interval(**agreement)) if agreement else NO_VALUE],
        ["mean score of demonstrations", NO_VALUE if zero is None else f"{zero:.2g}"],
    ]
    note = f"Over {rm['pairs']} held-out pairs; 95% intervals clustered by prompt."
    return Table("Reward model", note, ["measure", "value"], rows)


def _asked(record: Record, field: str) -> bool:
    """A field is null or absent where it cannot apply, such as a constraint that the prompt does not state."""
    return (record.get("fields") or {}).get(field) is not None


def _number(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.2f}"


def _mean_cell(golds: Sequence[float]) -> str:
    if len(golds) < 2:
        return f"{golds[0]:.2f} (n=1)" if golds else NO_VALUE
    return str(mean_interval(golds))


def _answer(record: Record | None) -> str:
    return NO_VALUE if record is None else f"({_score(record)}) {record['response']}"


def _score(record: Record) -> str:
    """The judge's number, or the reward model's where nobody judged."""
    return f"{record['proxy']:.2f}" if record.get("likert") is None else f"{record['likert']:g}"


def shown_prompt(prompt: Any) -> str:
    """A prompt as people read it; of a conversation a line a message, its role before it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _trained(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: evaluation["policies"][name] for name in POLICIES if evaluation["policies"].get(name)}


def _cell(text: str) -> str:
    """One Markdown cell: what would end it, break its line or be read as HTML is escaped."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
    return "<br>".join(safe.splitlines())
