"""How the rate and the memory grow with response length, batch, K and model: growth.json and a plot for each.

An axis is one process a side, its points from small to large, so that a process's peak memory is its last point's. The
first point is done twice and counted once. A point over its time (or killed for its memory) ends the axis: those
behind it are larger.
"""

import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from align.errors import UserError
from align.files import write_json
from benchmarks import workloads
from benchmarks.compare import ROOT, Sides, environment, failure, machine, parse

LABELS = {
    "length": "response length (tokens)",
    "batch": "batch (episodes)",
    "k": "K (ranked answers a prompt)",
    "model": "model (million parameters)",
}
COLOURS = {"ours": "#1f6fb4", "peer": "#c8601c"}


def grow(sides: Sides, point_seconds: float, seconds: float, folder: Path) -> list[dict]:
    """Every point of every axis, ours first, the peer in what is left of `seconds`; growth.json and the plots."""
    end = time.monotonic() + seconds
    taken: dict[str, dict[str, dict]] = {"ours": {}, "peer": {}}
    for side in taken:
        for axis, specs in workloads.GROWTH.items():
            names = [f"{axis}-{size}" for size in specs]
            names = [names[0], *names]
            line = sides.command(side, ",".join(names), next(iter(specs.values())))
            points = measure(line, names, point_seconds, end)
            next(points, None)  # the first point for the first time: everything is touched, nothing counts
            for point in points:
                taken[side][point["workload"]] = point
                print(f"{side} {point['workload']}: {point['rate']:.2f} {point['unit']}", flush=True)
    entries = [entry(axis, size, taken, point_seconds) for axis, specs in workloads.GROWTH.items() for size in specs]
    entries = [point | {"precision": sides.precision} for point in entries]
    write_json(folder / "growth.json", entries)
    plot_all(entries, folder)
    return entries


def measure(line: list[str], names: list[str], point_seconds: float, end: float) -> Iterator[dict]:
    """The points that came in time: each within `point_seconds`, all before `end` on the monotonic clock."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(), cwd=ROOT
        )  # fmt: skip
        for _ in names:
            point = next_point(process, min(point_seconds, end - time.monotonic()))
            if point is None:
                break
            yield point
        process.kill()
        errors.seek(0)
        # Killed here, or done; whatever else is a fault that the numbers must not hide.
        if (code := process.wait()) not in (0, -9):
            raise UserError(failure(names[0], line, code, errors.read()))


def next_point(process: subprocess.Popen, seconds: float) -> dict | None:
    """The next line of results; None when the process ended, or was ended because the time was up."""
    alarm = threading.Timer(max(0.0, seconds), process.kill)
    alarm.start()
    try:
        for text in process.stdout:
            if point := parse(text):
                return point
        process.wait()
        return None
    finally:
        alarm.cancel()


def entry(axis: str, size: float, taken: dict[str, dict[str, dict]], point_seconds: float) -> dict:
    """A point of growth.json; a side that was over its time has nulls."""
    name = f"{axis}-{size}"
    both = {side: points.get(name) for side, points in taken.items()}
    return {
        "axis": axis,
        "size": size,
        "unit": "pairs/s" if axis == "k" else "episodes/s",
        **{side: point and point["rate"] for side, point in both.items()},
        **{f"{side}_gib": point and point["peak_gib"] for side, point in both.items()},
        "over_time": [side for side, point in both.items() if point is None],
        "point_seconds": point_seconds,
        "date": date.today().isoformat(),
        "machine": machine(),
    }


def plot_all(points: list[dict], folder: Path) -> list[Path]:
    """growth-AXIS.png for each axis in `points`."""
    axes = dict.fromkeys(point["axis"] for point in points)
    return [plot(axis, [p for p in points if p["axis"] == axis], folder / f"growth-{axis}.png") for axis in axes]


def plot(axis: str, points: list[dict], path: Path) -> Path:
    figure, (rate, memory) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, suffix, label in ((rate, "", points[0]["unit"]), (memory, "_gib", "peak memory (GiB)")):
        for side, colour in COLOURS.items():
            known = [(p["size"], p[side + suffix]) for p in points if p[side + suffix] is not None]
            if known:
                panel.plot(*zip(*known, strict=True), "o-", color=colour, label="TRL" if side == "peer" else side)
        panel.set_xscale("log")
        sizes = [p["size"] for p in points]
        panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
        panel.set_xticks([], minor=True)
        panel.set_xlabel(LABELS[axis])
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    rate.set_yscale("log")
    rate.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    rate.yaxis.set_major_formatter("{x:g}")
    rate.yaxis.set_minor_locator(NullLocator())
    memory.set_ylim(bottom=0)
    if rate.lines:
        rate.legend()
    over = [f"{'TRL' if side == 'peer' else side} at {p['size']:g}" for p in points for side in p["over_time"]]
    note = f"\nnot in time: {', '.join(over)}" if over else ""
    figure.suptitle(f"{points[0]['machine']}, {points[0]['date']}{note}", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
