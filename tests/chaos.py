"""Stages killed at random moments, checkpoints damaged, inputs fuzzed, processes counted; what came of it in numbers.

    python -m tests.chaos                    # everything (`make chaos`), about a quarter of an hour on two cores
    python -m tests.chaos kills-ppo torn     # parts: kills-base, kills-sft, kills-rm, kills-ppo, torn, fuzz, processes

Each part adds its counts to runs/chaos.json. A killed stage is a real process, ended by SIGKILL. It is forked from one
that has imported the libraries already, so that no kill is wasted on imports; base, sft, rm and ppo run at mini size.
docs/reliability.md has the table.
"""

import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")

import torch
import yaml
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from align import config as configs
from align import data
from align.checkpoint import checkpoints, latest_checkpoint
from align.errors import UserError
from align.files import write_json
from align.manifest import check_parent, read_manifest
from align.parse import parse
from stages.__main__ import main as align_main
from tests.stages.conftest import WORLD, arguments, flags

RESULT = Path("runs/chaos.json")
KILLS = 10  # a stage
CASES = {"command lines": 4000, "config files": 3000, "data files": 3000, "conversions": 2000}
LATEST = {"resume_from_checkpoint": "latest"}
# Checkpoints so often that many a kill falls into the writing of one.
STAGES = {
    "base": {"save_steps": 3, "max_steps": 23, "logging_steps": 5},
    "sft": {"save_steps": 2, "logging_steps": 3, "residual_dropout": 0.1, "num_train_epochs": 8},
    "rm": {"save_steps": 1, "logging_steps": 2, "eval_steps": 2, "num_train_epochs": 4},
    "ppo": {"save_iterations": 1, "total_episodes": 96, "kl_target": 0.01, "kl_horizon": 100, "judge": "null"},
}


# A stage in a process of its own


def start(stage: str, run: Path, place: dict[str, str] | None = None, **changes) -> int:
    """Its process id. `place` is what a launcher would put into its environment. What it prints goes to chaos.log."""
    child = os.fork()
    if child:
        return child
    os.environ.update(place or {})
    AcceleratorState._reset_state(reset_partial_state=True)  # of this process, where a part before asked who it is
    log = os.open(run / "chaos.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        status = align_main([stage, *arguments(stage, run, **changes)])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child: int) -> int:
    """Exit status, or minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def completed(stage: str, run: Path, **changes) -> None:
    status = finish(start(stage, run, **changes))
    if status:
        tail = (run / "chaos.log").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{stage} ended with status {status}:\n{tail}")


def mini_run(run: Path, until: str) -> None:
    """The stages before `until`, where they are not there yet."""
    from data.world.__main__ import main as world

    if not (run / "data").exists():
        world(["--output_dir", str(run / "data"), *flags(WORLD)])
    for stage, folder in {"base": "base", "sft": "sft", "collect": "rankings", "rm": "rm", "ppo": "ppo"}.items():
        if stage == until:
            return
        if not (run / folder).exists():
            completed(stage, run)


def outcome(folder: Path) -> dict[str, bytes]:
    """Metrics, transcripts and all weights, those of the checkpoints that are left too."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".jsonl", ".safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "timing.jsonl"}


# Kills


def kills(stage: str, run: Path, rng: random.Random) -> dict[str, int]:
    """Killed at a random moment of its duration and resumed with the same command, `KILLS` times."""
    mini_run(run, stage)
    whole, cut = run / f"whole-{stage}", run / f"cut-{stage}"
    began = time.perf_counter()
    completed(stage, run, output_dir=whole, **STAGES[stage] | LATEST)
    duration, expected = time.perf_counter() - began, outcome(whole)
    counts = {"kills": 0, "identical": 0, "in_a_save": 0, "before_a_checkpoint": 0}
    while counts["kills"] < KILLS:
        shutil.rmtree(cut, ignore_errors=True)
        child = start(stage, run, output_dir=cut, **STAGES[stage] | LATEST)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if finish(child) != -signal.SIGKILL:
            continue  # it had ended before
        counts["kills"] += 1
        counts["in_a_save"] += any(cut.glob(".*.partial")) or (cut / ".partial").exists()
        counts["before_a_checkpoint"] += not checkpoints(cut)
        completed(stage, run, output_dir=cut, **STAGES[stage] | LATEST)
        found = outcome(cut)
        same = found == expected
        counts["identical"] += same
        if not same:
            names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            print(f"{stage}, kill {counts['kills']}: differs in {names}", file=sys.stderr)
    return counts


# Damage


def damages(path: Path, rng: random.Random) -> Iterator[Callable[[], None]]:
    """Ways to damage a file: cut in the middle, cut by a byte, one bit flipped, taken away."""
    whole = path.read_bytes()
    bit = rng.randrange(8 * len(whole)) if whole else 0
    flipped = bytearray(whole)
    if whole:
        flipped[bit // 8] ^= 1 << bit % 8
        yield lambda: path.write_bytes(whole[: len(whole) // 2])
        yield lambda: path.write_bytes(whole[:-1])
        yield lambda: path.write_bytes(bytes(flipped))
    yield path.unlink
    path.write_bytes(whole)


def torn(run: Path, rng: random.Random) -> dict[str, int]:
    """Each file of the newest checkpoint of each stage damaged in turn: the one before must be taken instead. Each
    file of a parent: the next stage must refuse it."""
    counts = {"torn_files": 0, "detected": 0, "torn_cases": 0}

    def count(path: Path, detected: Callable[[], bool]) -> None:
        results = []
        for damage in damages(path, rng):
            damage()
            with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
                results.append(detected())
        counts["torn_files"] += 1
        counts["torn_cases"] += len(results)
        counts["detected"] += all(results)

    for stage, changes in STAGES.items():
        mini_run(run, stage)
        whole = run / f"whole-{stage}"
        if not whole.exists():
            completed(stage, run, output_dir=whole, **changes)
        *_, before, newest = checkpoints(whole)
        for path in sorted(path for path in newest.rglob("*") if path.is_file()):
            count(path, lambda whole=whole, before=before: latest_checkpoint(whole, "latest") == before)
        if latest_checkpoint(whole, "latest") != newest:
            raise SystemExit(f"{newest} was to be whole again")
    for name in ("model.safetensors", "tokenizer.json", *read_manifest(run / "sft").files):
        count(run / "sft" / name, lambda: refused(run / "sft"))
    if refused(run / "sft"):
        raise SystemExit(f"{run / 'sft'} was to be whole again")
    return counts


def refused(parent: Path) -> bool:
    try:
        check_parent(str(parent), "model_name_or_path", ("sft",))
    except UserError:
        return True
    return False


# Fuzz


def fuzz(run: Path, rng: random.Random) -> dict[str, int]:
    """Configs and data rows: a value or a UserError of one line, never a traceback, a hang or a half-written file."""
    from tests.test_config import keys, values, words
    from tests.test_data import JSON, LINE

    folder, counts = run / "fuzz", Counter(fuzz_cases=0, fuzz_failures=0)
    folder.mkdir()
    stages = [configs.BaseConfig, configs.SFTConfig, configs.CollectConfig, configs.RMConfig, configs.PPOConfig,
              configs.EvaluateConfig, configs.EvaluateRMConfig]  # fmt: skip
    classes = st.sampled_from(stages)
    names = keys | st.sampled_from(sorted({name for cls in stages for name in cls.__dataclass_fields__}))
    suffixes = st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv", ".txt", ""])
    loaders = st.sampled_from([data.load_demonstrations, data.load_rankings, data.load_prompts, data.load_texts])

    def too_long(*_: object) -> None:
        raise TimeoutError("took over 10 s")

    signal.signal(signal.SIGALRM, too_long)

    def case(call: Callable[[], object]) -> None:
        fault = None
        signal.alarm(10)  # seconds
        try:
            call()
        except UserError as error:
            fault = None if len(str(error).splitlines()) == 1 else f"not one line: {error!r}"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if any(path.name.startswith(".") for path in folder.iterdir()):
            fault = "left a half-written file"
        signal.alarm(0)
        counts.update(fuzz_cases=1, fuzz_failures=fault is not None)
        if fault:
            print(f"fuzz: {fault}", file=sys.stderr)

    @many(CASES["command lines"])
    @given(classes, st.lists(st.tuples(names, words), max_size=6))
    def command_lines(cls, pairs):
        case(lambda: parse(cls, [word for key, value in pairs for word in (f"--{key}", value)]))

    @many(CASES["config files"])
    @given(classes, st.dictionaries(names, values, max_size=6).map(yaml.safe_dump) | st.text(max_size=60))
    def config_files(cls, content):
        (folder / "config.yaml").write_text(content, encoding="utf-8", errors="ignore")
        case(lambda: parse(cls, ["--config", str(folder / "config.yaml"), "--output_dir", "out"]))

    @many(CASES["data files"])
    @given(st.lists(LINE, max_size=5), suffixes, loaders, st.sampled_from(["stop", "drop"]))
    def data_files(rows, suffix, load, mode):
        (folder / f"rows{suffix}").write_bytes(b"\n".join(rows))
        case(lambda: load(str(folder / f"rows{suffix}"), mode))

    @many(CASES["conversions"])
    @given(st.lists(JSON.map(json.dumps) | st.text(max_size=40), max_size=5), suffixes)
    def conversions(rows, suffix):
        (folder / f"given{suffix}").write_text("\n".join(rows), encoding="utf-8", errors="ignore")
        words = [str(folder / f"given{suffix}"), "--output", str(folder / "converted.jsonl")]
        case(lambda: importlib.import_module("align.convert").main(words))

    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        for check in (command_lines, config_files, data_files, conversions):
            check()
    return dict(counts)


def many(examples: int) -> Callable:
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip


# Processes


def launched(stage: str, run: Path, processes: int, **changes) -> None:
    """The stage in so many gloo processes, of one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    children = [start(stage, run, (common | rank) if processes > 1 else {}, **changes) for rank in ranks]
    if any(statuses := [finish(child) for child in children]):
        tail = (run / "chaos.log").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{stage} in {processes} processes ended with {statuses}:\n{tail}")


def difference(one: Path, other: Path) -> float:
    """The largest of all numbers in metrics (over 1: relative) and of all weights."""
    rows = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (one, other)]
    if [row.keys() for row in rows[0]] != [row.keys() for row in rows[1]]:
        return float("inf")
    pairs = [(a[key], b[key]) for a, b in zip(*rows, strict=True) for key in a]
    worst = max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)
    for path in one.glob("**/model.safetensors"):
        first, second = load_file(path), load_file(other / path.relative_to(one))
        worst = max([worst, *(float((first[name] - second[name]).abs().max()) for name in first)])
    return worst


def processes(run: Path, rng: random.Random) -> dict[str, float]:
    """SFT, reward model and PPO in 2 and in 4 gloo processes against 1 at equal global batch."""
    worst = {}
    for stage in ("sft", "rm", "ppo"):
        mini_run(run, stage)
        for number in (1, 2, 4):
            changes = {"adam_epsilon": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 8 // number}
            if stage == "ppo":
                changes = {"adam_epsilon": 1e-3, "num_mini_batches": 2, "judge": "null"}
            launched(stage, run, number, output_dir=run / f"{stage}-{number}", **changes)
            if number > 1:
                gap = difference(run / f"{stage}-1", run / f"{stage}-{number}")
                worst[f"max_difference_{number}"] = max(gap, worst.get(f"max_difference_{number}", 0.0))
    return worst


# What the stages' libraries import when first used, and each child would again.
LATE = ("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "peft.tuners.lora")

PARTS = {f"kills-{stage}": functools.partial(kills, stage) for stage in STAGES}
PARTS |= {"torn": torn, "fuzz": fuzz, "processes": processes}


def main(words: list[str]) -> int:
    """Runs the parts named; 1 if any number of any part so far is not what it should be."""
    torch.set_num_threads(1)
    for module in ("stages.base", "stages.sft", "stages.collect", "stages.rm", "stages.ppo", *LATE):
        importlib.import_module(module)
    parts = json.loads(RESULT.read_text(encoding="utf-8"))["parts"] if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in words or PARTS:
            began = time.perf_counter()
            counts = PARTS[name](Path(folder), random.Random(name))
            parts[name] = counts | {"seconds": round(time.perf_counter() - began)}
            totals = sum((Counter(part) for part in parts.values()), Counter())
            keys = [key for part in parts.values() for key in part]
            write_json(RESULT, {key: totals[key] for key in dict.fromkeys(keys)} | {"parts": parts})
            print(name, parts[name], flush=True)
    good = totals["identical"] == totals["kills"] and totals["detected"] == totals["torn_files"]
    good &= totals["fuzz_failures"] == 0
    good &= max(totals["max_difference_2"], totals["max_difference_4"]) <= 1e-5
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
