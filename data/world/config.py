"""How large the world is."""

from dataclasses import dataclass, fields

from align.errors import UserError


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of the files that `python -m data.world` writes."""

    output_dir: str  # the folder to write; it must not exist yet, or be an earlier world (which is replaced)
    seed: int = 0  # changes everything but the lexicon, the facts and the wordings
    num_documents: int = 60_000  # rows of text.jsonl
    num_text_validation: int = 500
    num_demonstrations: int = 13_000
    num_demonstrations_validation: int = 600
    num_rm_prompts: int = 7_000
    num_rm_prompts_validation: int = 600
    num_ppo_prompts: int = 10_000
    num_validation_prompts: int = 300
    num_test_prompts: int = 800
    num_few_shot: int = 4

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise UserError("output_dir: empty; name the folder to write, e.g. --output_dir runs/tiny/data")
        for field in fields(self):
            if field.name.startswith("num_") and getattr(self, field.name) < 0:
                raise UserError(f"{field.name}: {getattr(self, field.name)}; it must be 0 or more")
