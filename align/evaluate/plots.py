"""The plots of a run, as PNG files. Each function takes plain data and the file to write, and returns that file.

Figures are built without pyplot: no global state, no display. What a run did not log says so in its panel.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align.evaluate.best_of_n import Law, fit_law
from align.evaluate.schema import POLICIES
from align.evaluate.win_rate import mean_interval
from align.files import plain

DPI = 120
INK, FAINT, GRID = "#333333", "#a8a8a8", "#e6e6e6"
PROXY, GOLD = "#7b5ea7", "#e08214"
HELD_OUT = "#3b75af"
LABELS = {"base": "base", "prompted": "base, few-shot", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
COLOURS = {"base": "#8a8f98", "prompted": "#c9a227", "sft": "#3b75af", "ppo": "#d1495b", "ppo_ptx": "#2a8a57"}

ACCURACY_GROUPS = {
    "by_k": "completions ranked (K)", "by_rank_distance": "difference in rank",
    "by_length": "better completion's length / worse's", "by_source": "source", "by_language": "language",
    "by_labeler": "labeler",
}  # fmt: skip
NEAR_SFT = 0.01  # sqrt(KL) of a policy that is SFT but for rounding
MOST_GROUPS = 12  # of a breakdown, those with the most pairs

Row = Mapping[str, Any]
Series = tuple[str, str, str]  # metric name, label, colour


def plot_policies(summary: Mapping[str, Any], path: Path) -> Path:
    """Gold score of every trained policy in a summary.json, sampled and greedy, with 95% intervals.

    Of a summary without a judge the reward model's score.
    """
    unjudged = summary.get("by_reward_model")
    policies = {name: summary["policies"][name] for name in POLICIES if summary["policies"].get(name)}
    what = "reward model's score" if unjudged else "gold score"
    figure, (axes,) = _figure(1, 1, (7.5, 4.4), f"Does each stage improve the {what}?")
    if not policies:
        return _save(figure, path, empty=axes)
    for offset, mode, hatch in ((-0.2, "sampled", ""), (0.2, "greedy", "///")):
        found = [unjudged[name][mode]["score"] if unjudged else policies[name][mode]["gold"] for name in policies]
        intervals = [plain(interval) for interval in found]
        x = np.arange(len(policies)) + offset
        colours = [COLOURS[name] for name in policies]
        means = [i["mean"] for i in intervals]
        face = colours if mode == "sampled" else "white"
        axes.bar(x, means, 0.37, color=face, edgecolor=colours, hatch=hatch, linewidth=1.2)
        axes.errorbar(x, means, yerr=_bars(intervals), fmt="none", ecolor=INK, capsize=3, linewidth=1.2)
        for at, interval in zip(x, intervals, strict=True):
            axes.text(at, interval["high"] + 0.06, f"{interval['mean']:.2f}", ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(policies)), [LABELS[name] for name in policies])
    axes.set_ylabel("reward model's score" if unjudged else "gold score (Likert, 1 to 7)")
    if unjudged:
        axes.axhline(0, color=FAINT, linewidth=1)
    else:
        axes.set_ylim(1, 7)
    axes.bar(0, 0, color=INK, label="sampled")
    axes.bar(0, 0, color="white", edgecolor=INK, hatch="///", label="greedy")
    axes.legend(loc="lower right" if unjudged else "upper left", frameon=False)
    return _save(figure, path)


def plot_use_cases(evaluation: Mapping[str, Any], path: Path, against: str = "ppo_ptx", mode: str = "sampled") -> Path:
    """Gold score of SFT and of one other policy for each use case, with 95% intervals where n >= 2."""
    trained = [name for name in ("sft", against) if evaluation["policies"].get(name)]
    groups = {name: _by_use_case(evaluation["policies"][name][mode]) for name in trained}
    cases = sorted({case for group in groups.values() for case in group})
    height = 1.4 + 0.55 * max(len(cases), 2)
    title = f"On which tasks does {LABELS[against]} improve on SFT? ({mode})"
    figure, (axes,) = _figure(1, 1, (7.5, height), title)
    if not cases:
        return _save(figure, path, empty=axes)
    for offset, name in zip((0.2, -0.2), trained, strict=False):
        rows = [(y + offset, groups[name][case]) for y, case in enumerate(cases) if case in groups[name]]
        intervals = [i for _, i in rows]
        y, means = [y for y, _ in rows], [i["mean"] for i in intervals]
        axes.barh(y, means, 0.37, color=COLOURS[name], label=LABELS[name])
        axes.errorbar(means, y, xerr=_bars(intervals), fmt="none", ecolor=INK, capsize=2.5, linewidth=1.1)
    count = {case: max(group[case]["n"] for group in groups.values() if case in group) for case in cases}
    axes.set_yticks(range(len(cases)), [f"{case.replace('_', ' ')} (n={count[case]})" for case in cases])
    axes.set_xlabel("gold score (Likert, 1 to 7)")
    axes.set_xlim(1, 7)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_ylim(-0.6, len(cases) - 0.4)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return _save(figure, path)


def plot_training(rows: Sequence[Row], path: Path, policy: str = "ppo_ptx") -> Path:
    """Six panels of a PPO run from the rows of its metrics.jsonl, against episodes."""
    colour, other = COLOURS[policy], INK
    figure, axes = _figure(2, 3, (13, 6.8), f"Did {LABELS[policy]} train steadily?")
    panels: list[tuple[str, str, tuple[Series, ...]]] = [
        (
            "Score",
            "reward model score",
            (
                ("objective/scores", "score", colour),
                ("objective/rlhf_reward", "score minus KL penalty", other),
                ("validation/scores", "score, held-out prompts", HELD_OUT),
            ),
        ),
        ("KL to the SFT policy", "nats per episode", (("objective/kl", "KL", colour),)),
        ("Entropy", "nats", (("objective/entropy", "entropy", colour),)),
        ("Response length", "tokens", (("objective/response_tokens", "length", colour),)),
        (
            "Endings and repetition",
            "share",
            (
                ("objective/finished", "responses that end in EOS", colour),
                ("objective/repetition", "3-grams that stood before", other),
            ),
        ),
        ("Value", "loss", (("loss/value_avg", "value loss", other),)),
    ]
    for panel, (title, unit, series) in zip(axes, panels, strict=True):
        _panel(panel, rows, "episode", title, unit, series)
    axes[4].set_ylim(-0.03, 1.03)
    _explained_variance(axes[5], rows, colour)
    for panel in axes[3:]:
        panel.set_xlabel("episodes")
    return _save(figure, path)


def plot_overoptimisation(rows: Sequence[Row], path: Path) -> Path:
    """Proxy and gold against sqrt(KL) for one run at several checkpoints, and RL's law (Gao et al. 2022, Fig. 1).

    A row has kl (nats per episode, to the SFT policy), proxy and gold, each a number or an interval, and may have
    episode, which is written beside its point.
    """
    rows = sorted((r for r in rows if all(r.get(k) is not None for k in ("kl", "proxy", "gold"))), key=_distance)
    figure, axes = _figure(2, 1, (7.5, 6.6), "Does the gold score follow the proxy as the policy moves away?")
    panels = (("proxy", "reward model score", PROXY), ("gold", "gold score (Likert)", GOLD))
    for panel, (name, unit, colour) in zip(axes, panels, strict=True):
        panel.set_title(name.capitalize(), fontsize=11, loc="left")
        panel.set_ylabel(unit)
        if not rows:
            _not_logged(panel)
            continue
        x, intervals = [_distance(r) for r in rows], [_as_interval(r[name]) for r in rows]
        means = [i["mean"] for i in intervals]
        panel.errorbar(x, means, yerr=_bars(intervals), color=colour, marker="o", capsize=3, linewidth=1.8)
        _rl_law(panel, x, means)
        best = int(np.argmax(means))
        panel.axvline(x[best], color=FAINT, linestyle=":", linewidth=1.2)
        left = x[best] > (x[0] + x[-1]) / 2
        panel.text(
            x[best],
            0.98,
            f" peak {means[best]:.2f} ",
            transform=panel.get_xaxis_transform(),
            va="top",
            ha="right" if left else "left",
            fontsize=9,
        )
        panel.margins(y=0.18)
    axes[1].set_xlabel("distance from SFT: square root of the KL (nats$^{1/2}$); small numbers: episodes")
    for row in rows[:: max(1, len(rows) // 8)]:  # more labels than that would cover each other
        if row.get("episode") is not None:
            at = (_distance(row), 0.02)
            axes[1].text(*at, f"{row['episode']:g}", transform=axes[1].get_xaxis_transform(), ha="center", fontsize=8)
    return _save(figure, path)


def _rl_law(panel: Axes, x: Sequence[float], means: Sequence[float]) -> None:
    """RL's law, fitted to the gain over the points at SFT, where there are any: PPO's first rollout is one."""
    start = [mean for at, mean in zip(x, means, strict=True) if at < NEAR_SFT]
    law = fit_law("rl", np.square(x), np.subtract(means, np.mean(start))) if start else None
    if law is None:
        return
    d = np.linspace(0, x[-1], 200)
    label = f"$R = d(\\alpha - \\beta \\ln d)$ with $\\alpha$ {law.alpha:.2f}, $\\beta$ {law.beta:.2f}"
    panel.plot(d, np.mean(start) + law.gain(d**2), "--", color=INK, linewidth=1.2, label=label)
    # beside the title, where no point can lie under it
    panel.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.01, 0.98))


def plot_best_of_n(found: Mapping[str, Any], path: Path) -> Path:
    """Proxy (and gold, where judged) of SFT's best of n and of each PPO policy against sqrt(KL), with 95% intervals.

    `found` is what `best_of_report` gives.
    """
    scores = [key for key in ("proxy", "gold") if found["scores"].get(key)]
    figure, axes = _figure(len(scores), 1, (7.5, 1 + 3.3 * len(scores)), "Is PPO worth it over SFT's best of n?")
    units = {"proxy": "reward model's score", "gold": "gold score (Likert)"}
    for panel, key in zip(axes, scores, strict=True):
        panel.set_title("By the reward model" if key == "proxy" else "By the judge", fontsize=11, loc="left")
        panel.set_ylabel(units[key])
        _best_of_curve(panel, found, key)
        for name, beside in found["policies"].items():
            kl, score = plain(beside["kl"]), plain(beside[key]["score"])
            x = _distance(beside)
            wide = [[x - _distance({"kl": kl["low"]})], [_distance({"kl": kl["high"]}) - x]]
            style = {"fmt": "D", "color": COLOURS[name], "capsize": 3, "zorder": 4, "label": LABELS[name]}
            panel.errorbar([x], [score["mean"]], yerr=_bars([score]), xerr=wide, **style)
        panel.margins(y=0.15)
    # beside the title, where no point can lie under it
    place = {"loc": "lower right", "bbox_to_anchor": (1.01, 0.98), "ncols": 4, "columnspacing": 1.2}
    axes[0].legend(frameon=False, fontsize=8, handlelength=1.6, **place)
    unit = "nats$^{1/2}$, of best-of-n at most"
    axes[-1].set_xlabel(f"distance from SFT: square root of the KL ({unit}); small numbers: n")
    return _save(figure, path)


def _best_of_curve(panel: Axes, found: Mapping[str, Any], key: str) -> None:
    """Best-of-n's points, each with its n, and the law fitted to them; dotted past the largest n."""
    curve, law, colour = found["curve"], found["laws"][key], COLOURS["sft"]
    intervals, x = [plain(row[key]) for row in curve], [_distance(row) for row in curve]
    style = {"fmt": "o", "color": colour, "capsize": 3, "label": "SFT, best of n"}
    panel.errorbar(x, [i["mean"] for i in intervals], yerr=_bars(intervals), **style)
    for row, at in zip(curve, x, strict=True):
        panel.text(at, 0.02, f"{row['n']}", transform=panel.get_xaxis_transform(), ha="center", fontsize=8)
    if law is None:
        return
    fitted = Law("best_of_n", law["alpha"], law["beta"])
    furthest = max(x[-1], *map(_distance, found["policies"].values()), 0.0)
    for start, end, line in ((0.0, x[-1], "--"), (x[-1], furthest, ":")):
        d = np.linspace(start, end, 100)
        label = "$R = d(\\alpha - \\beta d)$, fitted" if line == "--" else None
        panel.plot(d, intervals[0]["mean"] + fitted.gain(d**2), line, color=colour, linewidth=1.4, label=label)


def plot_calibration(report: Mapping[str, Any], path: Path) -> Path:
    """How often the reward model's favourite wins against what Bradley-Terry says, from `ranking_accuracy`."""
    figure, (axes,) = _figure(1, 1, (5.8, 5.2), "Do score gaps mean what Bradley-Terry says?")
    bins = report.get("calibration") or []
    if not bins:
        return _save(figure, path, empty=axes)
    observed = [plain(b["observed"]) for b in bins]
    x, means = [b["predicted"] for b in bins], [i["mean"] for i in observed]
    sizes = [20 + 260 * b["pairs"] / max(other["pairs"] for other in bins) for b in bins]
    axes.plot([0.5, 1], [0.5, 1], color=FAINT, linestyle="--", label="perfectly calibrated")
    axes.errorbar(x, means, yerr=_bars(observed), fmt="none", ecolor=INK, capsize=3, linewidth=1.1)
    axes.plot(x, means, color=COLOURS["sft"], linewidth=1.2)
    axes.scatter(x, means, s=sizes, color=COLOURS["sft"], zorder=3, label="observed (area: number of pairs)")
    axes.set_xlabel("predicted: sigmoid(score gap)")
    axes.set_ylabel("observed: share of pairs the favourite wins")
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.4, *(i["low"] - 0.02 for i in observed)), 1.02)
    axes.text(
        0.98,
        0.03,
        f"expected calibration error {report['calibration_error']:.3f}",
        transform=axes.transAxes,
        ha="right",
        fontsize=9,
    )
    legend = axes.legend(loc="upper left", frameon=False)
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([40])
    return _save(figure, path)


def plot_reward_accuracy(report: Mapping[str, Any], path: Path) -> Path:
    """A reward model's accuracy with 95% intervals: beside baselines, peer and ceiling, and by group (report.json)."""
    sections = [("", _scorers(report))]
    for name, title in ACCURACY_GROUPS.items():
        largest = sorted(report[name].items(), key=lambda item: -item[1]["pairs"])[:MOST_GROUPS]
        shown = [label for label in report[name] if label in dict(largest)]
        cells = [(f"{label[:28]} ({report[name][label]['pairs']})", report[name][label]["accuracy"]) for label in shown]
        sections += [(title, [(label, cell, COLOURS["sft"]) for label, cell in cells])] if len(cells) > 1 else []
    lines = sum(len(rows) + 1 for _, rows in sections)
    figure, (axes,) = _figure(1, 1, (8, 1.6 + 0.27 * lines), "How often does the reward model agree with the labeler?")
    y, ticks = 0.0, []
    for title, rows in sections:
        if title:
            axes.text(0.005, y, title, transform=axes.get_yaxis_transform(), fontsize=9, fontweight="bold", va="center")
        y -= 1.0 if title else 0.0
        for label, interval, colour in rows:
            bar = _bars([interval])
            axes.errorbar([interval["mean"]], [y], xerr=bar, fmt="o", color=colour, capsize=3, markersize=5)
            ticks.append((y, label))
            y -= 1.0
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=9)
    axes.set_ylim(y + 0.3, 0.7)
    axes.axvline(0.5, color=FAINT, linewidth=1)
    ceiling = report["labelers"]["ceiling"]
    if ceiling:
        axes.axvspan(ceiling["low"], ceiling["high"], color=GOLD, alpha=0.15, linewidth=0)
        axes.axvline(ceiling["mean"], color=GOLD, linewidth=1.2)
        place = {"transform": axes.get_xaxis_transform(), "fontsize": 8, "color": GOLD, "ha": "center"}
        axes.text(ceiling["mean"], 1.005, "ceiling where two labelers judged", **place)
    axes.set_xlabel("share of untied pairs in the labeler's order (number of pairs in brackets)")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    return _save(figure, path)


def _scorers(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float], str]]:
    """Label, accuracy and colour of the model and of what it is compared with."""
    bases, peer, people = report["baselines"], report["peer"], report["labelers"]
    rows = [("this model", report["accuracy"], COLOURS["sft"])]
    rows += [("where two labelers judged", people["accuracy"], COLOURS["sft"])] if people["ceiling"] else []
    rows += [("peer", peer["accuracy"], COLOURS["ppo"])] if peer else []
    rows += [("the longer is better", bases["length_only"], INK), ("length, fitted", bases["length_fitted"], INK)]
    return [*rows, ("random (95% of such scorers)", bases["random"], FAINT)]


def plot_overfitting(ranking_rows: Sequence[Row], pair_rows: Sequence[Row], path: Path) -> Path:
    """Held-out loss and accuracy over epochs: all pairs of a prompt one batch element, against shuffled pairs (3.5).

    The rows are those of two metrics.jsonl of `rm` with eval_steps; either may be empty.
    """
    figure, axes = _figure(1, 2, (10, 4), "Do shuffled pairs overfit sooner than whole rankings?")
    runs = ((ranking_rows, "rankings (K-wise)", COLOURS["ppo_ptx"]), (pair_rows, "shuffled pairs", COLOURS["ppo"]))
    panels = (
        ("eval_loss", "Held-out loss", "nats per pair, mean over prompts"),
        ("eval_accuracy", "Held-out accuracy", "share of untied pairs"),
    )
    for panel, (name, title, unit) in zip(axes, panels, strict=True):
        panel.set_title(title, fontsize=11, loc="left")
        panel.set_ylabel(unit)
        panel.set_xlabel("epochs")
        drawn = [(points, label, colour) for rows, label, colour in runs if len(points := _points(rows, "epoch", name))]
        for points, label, colour in drawn:
            panel.plot(*points.T, color=colour, label=label, marker="o", markersize=4, linewidth=1.8)
        if drawn:
            panel.legend(frameon=False, fontsize=9)
        else:
            _not_logged(panel)
    return _save(figure, path)


def plot_sft(rows: Sequence[Row], path: Path) -> Path:
    """Loss and token accuracy of an SFT run, from the rows that `SFTTrainer` logs."""
    figure, axes = _figure(1, 2, (10, 4), "Does SFT overfit the demonstrations?")
    colour = COLOURS["sft"]
    x = "epoch" if any("epoch" in row for row in rows) else "step"
    _panel(
        axes[0], rows, x, "Loss", "nats per token", (("loss", "training", FAINT), ("eval_loss", "validation", colour))
    )
    _panel(
        axes[1],
        rows,
        x,
        "Token accuracy",
        "share of tokens",
        (("mean_token_accuracy", "training", FAINT), ("eval_mean_token_accuracy", "validation", colour)),
    )
    for panel in axes:
        panel.set_xlabel("epochs" if x == "epoch" else "optimiser steps")
    return _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Figure, list[Axes]]:
    """A titled figure and its panels in reading order, styled alike."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", fontweight="bold", color=INK)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK)
    return figure, axes


def _save(figure: Figure, path: Path, empty: Axes | None = None) -> Path:
    if empty is not None:
        _not_logged(empty)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.align_ylabels()
    # matplotlib stamps its version into the file; without it the same numbers give the same bytes everywhere
    figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})
    return path


def _panel(panel: Axes, rows: Sequence[Row], x: str, title: str, unit: str, series: Sequence[Series]) -> None:
    """Lines of several metrics over `x`; a metric with many points is drawn faint under its moving average."""
    panel.set_title(title, fontsize=11, loc="left")
    panel.set_ylabel(unit)
    drawn = 0
    for name, label, colour in series:
        points = _points(rows, x, name)
        if not len(points):
            continue
        _line(panel, points, label, colour)
        drawn += 1
    if not drawn:
        _not_logged(panel)
    elif len(series) > 1:
        panel.legend(frameon=False, fontsize=9)


def _line(panel: Axes, points: np.ndarray, label: str, colour: str, style: str = "-") -> None:
    x, y = points.T
    window = max(len(x) // 20, 1)
    if window > 1:
        panel.plot(x, y, color=colour, alpha=0.25, linewidth=1)
        weights = np.ones(window) / window
        x, y = np.convolve(x, weights, mode="valid"), np.convolve(y, weights, mode="valid")
    marker = "o" if len(x) <= 12 else None
    panel.plot(x, y, color=colour, linewidth=1.8, label=label, linestyle=style, marker=marker, markersize=4)


def _explained_variance(panel: Axes, rows: Sequence[Row], colour: str) -> None:
    """Adds the share of the returns' variance that the values explain, on its own axis."""
    points = _points(rows, "episode", "val/explained_variance")
    if not len(points):
        return
    twin = panel.twinx()
    _line(twin, points, "explained variance (right)", colour, "--")
    twin.set_ylabel("explained variance")
    # a value function may start far below 0; one early point must not flatten the rest
    twin.set_ylim(max(-1.0, min(0.0, float(points[:, 1].min()))) - 0.03, 1.03)
    twin.spines["top"].set_visible(False)
    handles = [*panel.get_lines(), *twin.get_lines()]
    shown = [h for h in handles if not str(h.get_label()).startswith("_")]
    labels = [str(h.get_label()) for h in shown]
    # beside the title, where no line can run through it
    place = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.98), "ncols": 2, "columnspacing": 1.2}
    twin.legend(shown, labels, frameon=False, fontsize=8, handlelength=1.6, **place)


def _points(rows: Sequence[Row], x: str, name: str) -> np.ndarray:
    """(n, 2) the finite values of a metric over `x`, in the rows' order."""
    pairs = [(row[x], row[name]) for row in rows if _finite(row.get(x)) and _finite(row.get(name))]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def _by_use_case(records: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Gold score by use case: an interval and n; one lone record has no interval, so none is drawn."""
    golds: dict[str, list[float]] = {}
    for record in records:
        golds.setdefault(str(record.get("use_case", "unknown")), []).append(float(record["likert"]))
    table = {}
    for case, values in golds.items():
        interval = plain(mean_interval(values)) if len(values) > 1 else _as_interval(values[0])
        table[case] = interval | {"n": len(values)}
    return table


def _bars(intervals: Sequence[Mapping[str, float]]) -> np.ndarray:
    """(2, n) distances below and above the mean, as error bars want them."""
    return np.array([[i["mean"] - i["low"], i["high"] - i["mean"]] for i in intervals]).T.reshape(2, -1)


def _as_interval(value: Any) -> dict[str, float]:
    value = plain(value)
    return value if isinstance(value, dict) else {"mean": value, "low": value, "high": value}


def _distance(row: Row) -> float:
    """sqrt(KL): an estimate may fall below 0 by chance, and then counts as 0."""
    return math.sqrt(max(_as_interval(row["kl"])["mean"], 0.0))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _not_logged(panel: Axes) -> None:
    panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", va="center", color="#888888")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.grid(visible=False)
