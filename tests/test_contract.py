"""The walls and budgets of docs: who may import whom, how long a function may be, what an import may touch."""

import ast
import os
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("align", "stages", "data")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALIGN = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "align"]
STAGES = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "stages"]
MATHS = [path for path in ALIGN if path.relative_to(ROOT).parts[1] == "maths"]

PURE_STDLIB = {"math", "cmath", "dataclasses", "typing", "types", "collections", "functools", "itertools", "operator"}
PURE_STDLIB |= {"enum", "numbers", "abc", "fractions", "statistics", "__future__"}

# generate, ranking and update call the models' forward passes, which read the packs of packing.
FLOORS = (
    {
        "maths",
        "types",
        "config",
        "errors",
        "user_code",
        "cuda_graph",
        "runtime",
        "lock",
        "interrupt",
        "card",
        "files",
        "order",
        "parse",
        "initialise",
        "quantise",
        "optimise",
        "reward_functions",
    },
    {"attention", "prepack"},
    {"text", "checkpoint", "resume", "manifest", "rows", "splits", "packing", "postmortem", "track"},
    {"models", "data", "filters", "lengths"},
    {"generate", "vllm_engine", "ranking", "update", "readers", "lora", "demonstrations"},
    {"rewards", "reward_models", "judge", "head", "trainer"},
    {"rollout", "evaluate", "collect", "select"},
    {"validate", "convert", "stats", "label", "learn", "value_head", "step_zero"},
    {"prepare", "held_out", "plan"},
)
OPTIONAL = {"align.vllm_engine"}  # imports what a user installs beside us, and is imported where that is asked for
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}

MAX_STAGE_LINES = 200  # a stage has fewer
MAX_FUNCTION_LINES = 60
MAX_NESTING = 3
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.TryStar, ast.Match, ast.AsyncFor, ast.AsyncWith)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=name)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> list[tuple[str, int]]:
    """(dotted name, line) of everything imported, anywhere in the file; `from a import b` gives a.b as well as a."""
    found = []
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found += [(source, node.lineno)]
            found += [(f"{source}.{alias.name}", node.lineno) for alias in node.names]
    return found


def inside(dotted: str, package: str) -> bool:
    return dotted == package or dotted.startswith(package + ".")


def own_imports(path: Path) -> set[str]:
    """The project's own modules that a file imports."""
    return {dotted for dotted, _ in imports(path) if dotted in MODULES} - {module_name(path)}


# Walls


@each(MATHS)
def test_maths_is_pure(path):
    for dotted, line in imports(path):
        top = dotted.split(".")[0]
        allowed = top in PURE_STDLIB or top == "torch" or inside(dotted, "align.maths") or dotted == "align"
        assert allowed, f"{name(path)}:{line}: maths imports {dotted}"
        assert not inside(dotted, "torch.distributed"), f"{name(path)}:{line}: maths imports {dotted}"


@each(SOURCES)
def test_only_runtime_knows_processes(path):
    if path == ROOT / "align" / "runtime.py":
        return
    for dotted, line in imports(path):
        foreign = inside(dotted, "accelerate") or inside(dotted, "torch.distributed")
        assert not foreign, f"{name(path)}:{line}: only align/runtime.py imports {dotted}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            raise AssertionError(f"{name(path)}:{node.lineno}: only align/runtime.py uses torch.distributed")


@each(ALIGN)
def test_align_never_imports_stages_or_data(path):
    for dotted, line in imports(path):
        assert dotted.split(".")[0] not in ("stages", "data", "tests"), f"{name(path)}:{line}: align imports {dotted}"


@each(SOURCES)
def test_nothing_imports_tests(path):
    for dotted, line in imports(path):
        assert dotted.split(".")[0] not in ("tests", "pytest", "hypothesis"), f"{name(path)}:{line}: imports {dotted}"


def floor(dotted: str) -> int | None:
    parts = dotted.split(".")
    return FLOOR.get(parts[1]) if parts[0] == "align" and len(parts) > 1 else None


@each(ALIGN)
def test_floors(path):
    """A module imports its own floor and those below."""
    mine = floor(module_name(path))
    if module_name(path) == "align":
        return
    assert mine is not None, f"{name(path)}: stands on no floor; add it to FLOORS"
    for dotted, line in imports(path):
        theirs = floor(dotted)
        assert theirs is None or theirs <= mine, f"{name(path)}:{line}: floor {mine} imports {dotted} of floor {theirs}"


def test_no_circle_of_imports():
    graph = {module: own_imports(path) for module, path in MODULES.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert set(order) == set(MODULES)


# Budgets


@each(STAGES)
def test_stages_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < MAX_STAGE_LINES, f"{name(path)}: {lines} lines; a stage has fewer than {MAX_STAGE_LINES}"


@each(STAGES)
def test_stages_have_no_class(path):
    classes = [node.name for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert not classes, f"{name(path)}: a stage is read top to bottom; move {classes} to align/"


@each(SOURCES)
def test_functions_are_short(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{name(path)}:{node.lineno}: {node.name} has {lines} lines"


def deepest(node: ast.AST, depth: int = 0) -> tuple[int, int]:
    """(nesting, line) of the deepest block; `elif` is not a level of its own."""
    best = (depth, getattr(node, "lineno", 0))
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            is_elif = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If) and len(value) == 1
            step = isinstance(child, BLOCKS) and not is_elif
            best = max(best, deepest(child, depth + step))
    return best


@each(SOURCES)
def test_nesting_is_shallow(path):
    depth, line = deepest(tree(path))
    assert depth <= MAX_NESTING, f"{name(path)}:{line}: nesting {depth}, at most {MAX_NESTING}"


def test_nesting_counter():
    code = "for a in b:\n if a:\n  x\n elif b:\n  x\n else:\n  with c:\n   x"
    assert deepest(ast.parse(code))[0] == 3  # for, if, with; elif is no deeper than if


# Safety


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, key: str):
    return next((k.value.value for k in call.keywords if k.arg == key and isinstance(k.value, ast.Constant)), None)


@each(SOURCES)
def test_pickles_are_read_with_weights_only(path):
    for call in calls(path):
        if ast.unparse(call.func) in ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "dill.load"):
            safe = ast.unparse(call.func) == "torch.load" and keyword(call, "weights_only") is True
            assert safe, f"{name(path)}:{call.lineno}: {ast.unparse(call.func)} without weights_only=True"


@each(SOURCES)
def test_no_remote_code(path):
    for call in calls(path):
        line = f"{name(path)}:{call.lineno}"
        remote = [k for k in call.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"]
        assert not remote, f"{line}: trust_remote_code must stay off"
        assert ast.unparse(call.func) not in ("eval", "exec"), f"{line}: {ast.unparse(call.func)}"


@each(SOURCES)
def test_no_hard_coded_device(path):
    for call in calls(path):
        cuda = isinstance(call.func, ast.Attribute) and call.func.attr == "cuda"
        assert not cuda, f"{name(path)}:{call.lineno}: .cuda(); use the runtime's device"


IMPORT_ALL = """
import importlib, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("an import opened a connection")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
for module in sys.argv[1:]:
    importlib.import_module(module)

import torch
from accelerate import PartialState
assert not torch.distributed.is_initialized(), "an import started a process group"
assert not torch.cuda.is_initialized(), "an import initialised CUDA"
assert not PartialState._shared_state, "an import started accelerate"
for module in sys.argv[1:]:
    assert not module.startswith("align") or "stages" not in sys.modules, "align imported stages"
"""


def test_importing_touches_nothing():
    """Every module of align imports in a fresh process: no connection, no process group, no device."""
    modules = [module for module in MODULES if inside(module, "align") and module not in OPTIONAL]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]


LAUNCHES = {  # file -> how accelerate starts it, and what the stages' processes then read from their environment
    "cpu": ("simple", {"ACCELERATE_USE_CPU": "True"}),
    "cpu2": ("simple", {"ACCELERATE_USE_CPU": "True"}),
    "single_gpu": ("simple", {"ACCELERATE_MIXED_PRECISION": "no"}),
    "multi_gpu": ("multi", {"ACCELERATE_MIXED_PRECISION": "no"}),
    "multi_node": ("multi", {"ACCELERATE_MIXED_PRECISION": "no"}),
    "fsdp2": ("multi", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}),
    "zero2": ("deepspeed", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
}


@pytest.mark.parametrize("file", LAUNCHES)
def test_accelerate_launches_by_each_config(file, monkeypatch):
    """By its own parser and checks, and its plugins take what it hands on."""
    from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    path = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "stages.ppo"])
    args, defaults, _ = _validate_launch_command(args)
    how, wanted = LAUNCHES[file]
    assert args.use_deepspeed == (how == "deepspeed") and (args.use_fsdp or args.multi_gpu) == (how == "multi")
    if how == "deepspeed":
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        env = launch.prepare_deepspeed_cmd_env(args)[1]
    else:
        env = launch.prepare_multi_gpu_env(args) if how == "multi" else launch.prepare_simple_launcher_cmd_env(args)[1]
    assert wanted.items() <= env.items()
    for name, value in env.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    if file == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    if how == "deepspeed":
        assert DeepSpeedPlugin().zero_stage == int(file[-1])


def test_every_accelerate_config_is_checked():
    assert {path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml")} == set(LAUNCHES)
