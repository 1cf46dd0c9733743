"""`python -m stages STAGE --config FILE [--key value ...]`, also installed as the command `align`."""

import importlib
import sys

from align.errors import UserError

STAGES = {
    "base": "text -> base language model and tokenizer (the embedded stand-in for a pretrained model)",
    "sft": "demonstrations -> policy",
    "collect": "policy -> K samples a prompt -> rankings",
    "rm": "rankings -> reward model",
    "ppo": "prompts, policy, reward model -> policy",
    "evaluate": "checkpoints -> numbers with intervals, plots, a report",
    "curve": "a PPO run's checkpoints -> proxy and true score against KL",
}
TOOLS = {"validate": "FILE...: report every bad row of data files"}


def usage() -> str:
    lines = [f"  {name:9} {what}" for name, what in (STAGES | TOOLS).items()]
    return "usage: align STAGE --config FILE [--run DIR] [--key value ...]\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name == "validate":
        from align.validate import main as validate

        return validate(rest)
    if name not in STAGES:
        print(f"align: unknown stage {name!r}\n{usage()}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"stages.{name}").main, rest)


def run(stage, argv: list[str]) -> int:
    """Run a stage; what the user can mend is one line and exit status 2, never a traceback."""
    try:
        stage(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; resume with --resume_from_checkpoint latest where the stage saves checkpoints",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
