"""`python -m stages STAGE --config FILE [--key value ...]`, also installed as the command `align`."""

import importlib
import json
import sys
import time
import traceback
from pathlib import Path

import psutil

from align.errors import UserError

STAGES = {
    "base": "text -> base language model and tokenizer (the embedded stand-in for a pretrained model)",
    "sft": "demonstrations -> policy",
    "collect": "policy -> K samples a prompt -> rankings",
    "rm": "rankings -> reward model",
    "ppo": "prompts, policy, reward model -> policy",
    "evaluate": "checkpoints -> numbers with intervals, plots, a report",
    "evaluate choices": "checkpoints -> accuracy on multiple choice, entropy of pairs of sentences",
    "evaluate rm": "reward model, held-out rankings -> accuracy beside baselines, peer and labelers",
}
TOOLS = {
    "convert": "FILE... --output FILE: public formats -> ours, every dropped row named",
    "prepare": "--config FILE --data_dir FOLDER: the files of a run from public data, split by prompt over all of them",
    "validate": "FILE...: report every bad row of data files",
    "plan": "--config PPO.yaml --model FOLDER: what stage 3 will hold in memory",
    "label": "FILE... --labelers NAME... --output FOLDER: a page a labeler, on which people rank answers",
    "stats": "FILE...: counts, K, lengths, ties, agreement, duplicates, shared prompts",
}


def usage() -> str:
    lines = [f"  {name:16} {what}" for name, what in (STAGES | TOOLS).items()]
    return "usage: align STAGE --config FILE [--run DIR] [--key value ...]\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # reward functions beside the user's files
        sys.path.append(str(Path.cwd()))
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    parts = 2 if " ".join(words[:2]) in STAGES else 1
    name, rest = " ".join(words[:parts]), words[parts:]
    if name in TOOLS:
        return run_tool(name, rest)
    if name not in STAGES:
        print(f"align: unknown stage {name!r}\n{usage()}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"stages.{name.replace(' ', '_')}").main, rest)


def run(stage, argv: list[str]) -> int:
    """Run a stage, in this process or as one of several, and end their group."""
    from align.runtime import end_processes, leave_processes  # late: torch, which `align --help` need not load

    try:
        status = run_here(stage, argv)
        if status == 0:
            end_processes()
    except Exception:
        leave_processes(1, traceback.format_exc())
        raise
    if status:
        leave_processes(status)
    return status


def run_here(stage, argv: list[str]) -> int:
    """What the user can mend is one line and exit status 2, never a traceback; a signal to end is one
    line and 128 + its number."""
    from align.checkpoint import full_disk  # late: torch, which `align --help` need not load
    from align.interrupt import Interrupted, handled
    from align.runtime import end_processes

    try:
        with handled():
            stage(argv)
            record_seconds(argv, stage)
    except UserError as error:
        return fail(error)
    except Interrupted as stop:
        if stop.checkpoint is not None:  # which all processes saved together
            record_seconds(argv, stage)
            end_processes()
        return fail(stop, "", stop.status)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and {"-h", "--help"} & set(argv):  # `align ppo --help | head`
            sys.stderr.close()
            return 1
        known = full_disk(error)
        if known is None:
            raise
        return fail(known)
    return 0


def run_tool(name: str, argv: list[str]) -> int:
    try:
        return importlib.import_module(f"align.{name}").main(argv)
    except UserError as error:
        return fail(error)
    except BrokenPipeError:  # `align stats FILE | head`
        sys.stderr.close()
        return 1


def fail(error: BaseException, label: str = "error: ", status: int = 2) -> int:
    """Tell it on a line of its own, after the progress bars that it left open; returns the exit status."""
    from tqdm import tqdm

    from align.manifest import redact

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"{label}{redact(str(error))}", file=sys.stderr)
    return status


def record_seconds(argv: list[str], stage) -> None:
    """What the stage took, imports included, in the run's seconds.json; the output folder's name is the key. A resumed
    run adds to what it took before."""
    from align.files import write_json  # late: torch, which `align --help` need not load
    from align.parse import read_flags
    from align.runtime import is_main_process

    flags, name = read_flags(argv, bare=None), Path(sys.modules[stage.__module__].__file__).stem
    if "output_dir" in flags and name != "evaluate_rm":  # whose output may lie in the model's
        name = Path(flags["output_dir"]).name
    if "run" not in flags or not is_main_process():
        return
    resumed, output = "resume_from_checkpoint" in flags, flags.get("output_dir", f"{flags['run']}/{name}")
    if not (resumed and was_finished(Path(output))):
        seconds = seconds_so_far(flags["run"], name, resumed)
        write_json(Path(flags["run"]) / "seconds.json", seconds)


def was_finished(output: Path) -> bool:
    """Whether the stage had nothing to do: its manifest is older than this process."""
    manifest = output / "manifest.json"
    return manifest.exists() and manifest.stat().st_mtime < psutil.Process().create_time()


def seconds_so_far(run_dir: str, name: str, resumed: bool = False) -> dict[str, float]:
    """Seconds of the run's stages; under `name` those since this process started, imports included, and those before
    if it was `resumed`."""
    path = Path(run_dir) / "seconds.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or torn
        known = {}
    before = known.get(name, 0.0) if resumed else 0.0
    return known | {name: round(before + time.time() - psutil.Process().create_time(), 1)}


if __name__ == "__main__":
    sys.exit(main())
