"""Writes the embedded world, or shows what the judge gives to degenerate policies.

python -m data.world --output_dir DIR [--config FILE] [--seed 0] [--num_documents N ...]
python -m data.world --table
"""

import sys

from align.errors import UserError
from align.parse import parse
from data.world import policies, prompts
from data.world.build import build, save
from data.world.config import WorldConfig


def print_table(number: int = 800) -> None:
    """Mean Likert score of each degenerate policy."""
    rows = prompts.write_prompts(0, "test", number, set())
    for name, score in sorted(policies.score_table(rows).items(), key=lambda item: item[1]):
        print(f"{name:28s} {score:5.2f}")


def main(argv: list[str]) -> None:
    if "--table" in argv:
        print_table()
        return
    config = parse(WorldConfig, argv)
    files, facts = build(config)
    output = save(config, files, facts)
    demonstrations = facts["demonstrations"]
    print(f"{output}: {', '.join(f'{name} {count}' for name, count in facts['rows'].items())}")
    print(f"demonstrations: mean gold {demonstrations['gold']:.2f}, perfect {demonstrations['perfect']:.0%}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
