"""Every config key acts: a stage reads each field of its config, in its own file or in a function that it reaches."""

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from align import config as configs

ROOT = Path(__file__).resolve().parents[1]
PARSED = re.compile(r"= parse\((\w+), argv\)")
FILES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "stages").glob("*.py"))}
STAGES = {name: getattr(configs, m[1]) for name, text in FILES.items() if (m := PARSED.search(text))}
Unit = tuple[str, str]  # a module and the name of a function, class or constant in it


def source(module: str) -> Path | None:
    stem = ROOT.joinpath(*module.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


@cache
def definitions(module: str) -> dict[str, ast.AST]:
    """What a module defines at its top, by name."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(source(module).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


@cache
def names(module: str) -> dict[str, Unit]:
    """What a name means in a module, if it is the project's own."""
    known = {name: (module, name) for name in definitions(module)}
    for node in ast.walk(ast.parse(source(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("align", "stages"):
            known |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return {name: unit for name, unit in known.items() if source(unit[0])}


def reached(start: Unit) -> list[ast.AST]:
    """The code of `start` and of whatever it names, on and on. A class counts with all its methods."""
    seen, waiting, code = set(), [start], []
    while waiting:
        unit = waiting.pop()
        if unit in seen or unit[0] in ("align.config", "align.parse") or unit[1] not in definitions(unit[0]):
            continue
        seen.add(unit)
        code.append(definitions(unit[0])[unit[1]])
        known = names(unit[0])
        waiting += [known[n.id] for n in ast.walk(code[-1]) if isinstance(n, ast.Name) and n.id in known]
    return code


def is_config(node: ast.AST) -> bool:
    return getattr(node, "id", None) == "config" or getattr(node, "attr", None) == "config"


@cache
def read_by(stage: str) -> frozenset[str]:
    """Attributes that a stage reads of `config` or of something's `.config`."""
    nodes = [node for code in reached((f"stages.{stage}", "main")) for node in ast.walk(code)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_config(node.value)}
    return frozenset(read.union(*(behind for name, behind in properties().items() if name in read)))


@cache
def properties() -> dict[str, set[str]]:
    """What the configs' properties read of their own fields."""
    methods = [m for c in definitions("align.config").values() for m in getattr(c, "body", [])]
    return {
        method.name: {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
        for method in methods
        if isinstance(method, ast.FunctionDef) and any("property" in ast.unparse(d) for d in method.decorator_list)
    }


def test_every_stage_is_looked_at():
    from stages.__main__ import STAGES as COMMANDS

    assert {name.replace(" ", "_") for name in COMMANDS} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_is_read(stage):
    unread = {field.name for field in dataclasses.fields(STAGES[stage])} - read_by(stage)
    assert not unread, f"align {stage} takes these keys and ignores them: {sorted(unread)}"


def test_the_walk_sees_what_a_stage_reaches_and_no_more():
    """Through functions of other modules, methods and helpers; not what another stage's helpers read."""
    assert {"seed", "old_logprobs", "cliprange", "max_grad_norm", "ema_decay"} <= read_by("ppo")
    assert {"logging_steps", "muon_learning_rate", "lora_r"} <= read_by("sft")
    assert not {"logging_steps", "eval_steps", "residual_dropout", "min_k", "selection_prompts"} & read_by("ppo")
    assert not {"cliprange", "learning_rate", "report_to"} & read_by("collect")
