"""The documents say what is true: names, lines, commands and keys in them exist.

python tests/test_docs.py --fix     rewrites the lines of docs/details.md that moved, and prints them
"""

import ast
import dataclasses
import re
import sys
from functools import cache
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torch_parser

ROOT = Path(__file__).resolve().parents[1]
DETAILS = ROOT / "docs" / "details.md"
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
REFERENCE = re.compile(r"`([\w./]+\.py):(\d+) ([\w.]+)`")
PAGES = (*READMES, *(ROOT / "docs" / f"{name}.md" for name in ("running", "results", "rewards")))  # commands to type
SLACK = 3  # lines a function may have moved
COUNTS = {"D": 3, "S": 6, "R": 12, "P": 18, "X": 4, "K": 2, "O": 5}
IDS = (
    {f"{letter}{i}" for letter, count in COUNTS.items() for i in range(1, count + 1)}
    | {"K4", "K5"}
    | {f"O{i}" for i in range(1, 6)}
)
NOT_KEYS = {"num_labels", "mixed_precision", "ppo_ptx", "by_column"}  # code in the READMEs that looks like a config key


@cache
def definitions(path: str) -> dict[str, int]:
    """Dotted name of each function, class and method of a file -> its line."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((ROOT / path).read_text(encoding="utf-8")), "")
    return found


@cache
def known_tests() -> frozenset[str]:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    return frozenset(name for source in sources for name in re.findall(r"^ *def (test_\w+)", source, re.MULTILINE))


def ledger() -> dict[str, list[str]]:
    """id -> cells of its row in the first table of docs/details.md."""
    rows = [line.strip().strip("|").split("|") for line in DETAILS.read_text(encoding="utf-8").splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {row[0]: row for row in cells if re.fullmatch(r"[A-Z]\d+", row[0])}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_comments(code: str) -> str:
    return "\n".join(re.sub(r"\s*#.*$", "", line).rstrip() for line in code.splitlines())


def code_lines(text: str) -> list[str]:
    """Every line of code: fenced blocks without comments, continued lines joined, and inline code outside them."""
    fenced = "\n".join(without_comments(code) for _, code in blocks(text)).replace("\\\n", " ")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced.splitlines() + re.findall(r"`([^`\n]+)`", prose)


def stage_and_flags(line: str) -> tuple[str, str]:
    """The stage that a line of code runs and what it gets; "" when any stage may be meant."""
    line = line.replace("evaluate rm ", "evaluate_rm ").replace("evaluate choices ", "evaluate_choices ")
    for pattern in (r"-m stages[. ](\w+)(.*)", r"\bmake ([a-z-]+) .*ARGS=(.*)"):
        if match := re.search(pattern, line):
            return match[1], match[2]
    return "", line if line.startswith("--") else ""


def fields_of_stages() -> dict[str, set[str]]:
    """Stage or make target -> its config keys; "" -> the keys of any stage."""
    from align import config

    classes = {"base": "Base", "sft": "SFT", "collect": "Collect", "rm": "RM", "ppo": "PPO", "evaluate": "Evaluate"}
    classes |= {"evaluate_rm": "EvaluateRM", "evaluate_choices": "EvaluateChoices"}
    fields = {n: {f.name for f in dataclasses.fields(getattr(config, f"{c}Config"))} for n, c in classes.items()}
    fields |= {"ppo-plain": fields["ppo"], "overoptimise": fields["ppo"]}
    fields |= {"rm-folds": fields["rm"], "rm-report": fields["evaluate_rm"]}
    return fields | {"": set().union(*fields.values())}


# docs/details.md


def test_every_id_has_its_row():
    missing = IDS - ledger().keys()
    assert not missing, f"docs/details.md has no row for {sorted(missing)}"


def test_every_test_named_after_an_id_has_a_row():
    named = {i for name in known_tests() for i in re.findall(r"(?<=_)([DSRPXKO]\d+)(?=_)", name)}
    assert named <= ledger().keys(), f"tests but no row for {sorted(named - ledger().keys())}"


def test_every_row_names_tests_that_exist():
    for number, row in ledger().items():
        tests = re.findall(r"`(test_\w+)`", row[-1])
        assert tests or row[-1] == "no test", f"{number}: name its tests, or say: no test"
        assert not tests or any(f"_{number}_" in name for name in tests), f"{number}: no test named after it"
    missing = set(re.findall(r"`(test_\w+)`", read(DETAILS))) - known_tests()
    assert not missing, f"docs/details.md names tests that do not exist: {sorted(missing)}"


def test_every_function_is_at_its_line():
    found = REFERENCE.findall(read(DETAILS))
    assert len(found) > len(IDS)
    for path, line, name in found:
        assert (ROOT / path).is_file(), f"docs/details.md names {path}, which does not exist"
        real = definitions(path).get(name)
        assert real, f"docs/details.md: {path} has no {name}"
        assert abs(real - int(line)) <= SLACK, f"docs/details.md: {path}:{line} {name} is at {real}; run with --fix"


def test_every_ledger_row_names_code():
    for number, row in ledger().items():
        assert REFERENCE.search(row[3]), f"{number}: no code named"


# README.md and README.zh-CN.md


def test_both_readmes_have_the_same_headings_and_code():
    english, chinese = (read(path) for path in READMES)
    for text in (english, chinese):
        assert text.count("<!-- results -->") == text.count("<!-- /results -->") == 1
    levels = [re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", t, flags=re.M | re.S), re.M) for t in (english, chinese)]
    assert levels[0] == levels[1]
    ours, theirs = blocks(english), blocks(chinese)
    assert len(ours) == len(theirs)
    for (language, code), (other, same) in zip(ours, theirs, strict=True):
        assert (language, without_comments(code)) == (other, without_comments(same))


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", read(ROOT / "Makefile"), re.MULTILINE))
    for path in PAGES:
        named = {t for line in code_lines(read(path)) for t in re.findall(r"\bmake ([a-z][a-z-]*)", line)}
        assert named or path not in READMES, f"{path.name}: no make target found"
        assert named <= targets, f"{path.name}: no such make target: {sorted(named - targets)}"


CONTINUED = re.compile(r"\\\n#?")
LAUNCHED = re.compile(r"\b(torchrun|accelerate launch) +(-.*)")


def launches() -> list[tuple[str, list[str]]]:
    """(launcher, its words) of every command of documents, stages and configs that starts several processes."""
    folders = (("docs", "*.md"), ("stages", "*.py"), ("configs/accelerate", "*.yaml"))
    texts = [
        read(path) for path in (*READMES, *(f for name, kind in folders for f in sorted((ROOT / name).glob(kind))))
    ]
    lines = [line for text in texts for line in CONTINUED.sub(" ", text).splitlines() if " -m " in line]
    found = [LAUNCHED.search(without_comments(line.removeprefix("#"))) for line in lines]
    return [(match[1], match[2].split()) for match in found if match]


def test_launchers_hand_a_stage_its_own_flags():
    """torchrun has flags that `--run` begins, and stops at what could be either."""
    parsers = {"torchrun": torch_parser(), "accelerate launch": launch_command_parser()}
    assert {launcher for launcher, _ in launches()} == set(parsers)
    for launcher, words in launches():
        args = parsers[launcher].parse_args(words)
        given = words[words.index(args.training_script) + 1 :]
        assert args.training_script.startswith("stages.") and args.module, words
        assert args.training_script_args == given and "--config" in given, words


def test_every_flag_exists():
    fields = fields_of_stages()
    for path in PAGES:
        for line in code_lines(read(path)):
            stage, rest = stage_and_flags(line)
            for key in re.findall(r"--(\w+)", rest):
                known = fields[stage if stage in fields else ""] | {"config", "run"}
                assert key in known, f"{path.name}: {line!r}: {stage or 'no stage'} has no --{key}"


def test_every_config_key_exists():
    keys = fields_of_stages()[""]
    for path in READMES:
        text = read(path)
        yaml = [line for language, code in blocks(text) if language == "yaml" for line in code.splitlines()]
        named = {m[1] for line in yaml if (m := re.match(r"(\w+):", line))}
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        named |= set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:: [^`]+)?`", prose)) - NOT_KEYS
        assert named <= keys, f"{path.name}: no such config key: {sorted(named - keys)}"


def test_keys_in_details_exist():
    keys = fields_of_stages()[""]
    silent = read(DETAILS).split("## Where the paper is silent")[1]
    named = set(re.findall(r"[(,] ?`([a-z]+(?:_[a-z]+)*)(?:: [^`]+)?`", silent))
    assert named and named <= keys, f"docs/details.md: no such config key: {sorted(named - keys)}"


def test_every_link_leads_somewhere():
    for path in (*READMES, *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
            if not target.startswith(("http://", "https://", "#")):
                assert (path.parent / target.split("#")[0]).exists(), f"{path.name}: {target} does not exist"


def test_every_file_named_exists():
    """Paths of the repository in the READMEs' prose, such as `align/update.py`; not those of a run or a user's own."""
    for path in READMES:
        prose = re.sub(r"^```.*?^```", "", read(path), flags=re.MULTILINE | re.DOTALL)
        for name in re.findall(r"`((?:align|stages|configs|data|docs|tests)/[\w./*{}-]*)`", prose):
            if "{" not in name and not name.startswith("configs/mine"):
                assert list(ROOT.glob(name.rstrip("/"))), f"{path.name}: {name} does not exist"


# docs/metrics.md


def test_every_logged_metric_is_defined():
    documented = set(re.findall(r"`([\w/]+)`", read(ROOT / "docs" / "metrics.md")))
    tree = ast.parse(read(ROOT / "align" / "track.py"))
    rows = ("ppo_metrics", "sampling_metrics")
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in rows]
    assert len(functions) == len(rows)
    keys = [key for f in functions for node in ast.walk(f) if isinstance(node, ast.Dict) for key in node.keys]
    logged = {key.value for key in keys if isinstance(key, ast.Constant)}
    logged |= set(re.findall(r'"(eval/\w+)":', read(ROOT / "align" / "rewards.py")))
    assert len(logged) > 10 and logged <= documented, f"docs/metrics.md lacks {sorted(logged - documented)}"


def fix() -> None:
    """Put the right line into every `file:LINE function` of docs/details.md."""

    def right(match: re.Match) -> str:
        path, line, name = match.groups()
        real = definitions(path).get(name) if (ROOT / path).is_file() else None
        if real is None:
            print(f"{path} has no {name}: mend it by hand")
            return match[0]
        if real != int(line):
            print(f"{path}:{line} {name} -> {real}")
        return f"`{path}:{real} {name}`"

    DETAILS.write_text(REFERENCE.sub(right, read(DETAILS)), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit("usage: python tests/test_docs.py --fix")
    fix()
