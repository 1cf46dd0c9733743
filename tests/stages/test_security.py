"""What files of others' making cannot do: run code, leave the run folder; and what is never written down."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.__main__ import main

pytestmark = pytest.mark.xdist_group("stages")
ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for name in ("align", "stages", "data", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py")
)


@pytest.fixture
def refused(mini, capsys):
    def check(stage: str, *words: str, **changes) -> None:
        assert main([stage, *mini.arguments(stage, mini.run, **changes)]) == 2
        last = capsys.readouterr().err.rstrip().splitlines()[-1]
        assert last.startswith("error: ") and all(word in last for word in words), last

    return check


def calls(path: Path) -> list[tuple[str, str, dict[str, str]]]:
    """(place, function, keyword -> value) of each call, as they are written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (f"{path}:{node.lineno}", ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg})
        for node in found
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_pickle_is_read_with_weights_only(path):
    for place, function, keywords in calls(path):
        if function.split(".")[-1] in ("load", "loads") and function.split(".")[0] in (
            "torch",
            "pickle",
            "joblib",
            "dill",
        ):
            assert function == "torch.load" and keywords.get("weights_only") == "True", place
        assert not (function in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False"), place


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "align")], ids=lambda path: path.name)
def test_models_are_safetensors_and_bring_no_code(path):
    """Said at each call: without a word transformers asks on the terminal whether to run the code."""
    source = path.read_text(encoding="utf-8")
    for place, function, keywords in calls(path):
        if not function.endswith((".from_pretrained", ".from_config")) or "Peft" in function:
            continue
        options = "options" in source.split(function)[1][:60]  # models._load, whose options say both
        assert options or keywords.get("trust_remote_code") == "False", place
        if "Model" in function and function.endswith("from_pretrained"):
            assert options or keywords.get("use_safetensors") == "True", place


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.npy", "rows.jsonl", "rows.parquet", "rows.json"])
def test_a_pickle_given_as_data_is_not_read_as_one(refused, tmp_path, name):
    path, made = tmp_path / name, tmp_path / "made"
    if name.endswith(".npy"):
        np.save(path, np.array([Touch(made)], dtype=object), allow_pickle=True)
    elif name.endswith(".pt"):
        torch.save([Touch(made)], path)
    else:
        path.write_bytes(pickle.dumps([Touch(made)]))
    refused("sft", str(path), train_file=path, output_dir=tmp_path / "out")
    refused("ppo", str(path), train_file=path, output_dir=tmp_path / "out")
    assert not made.exists() and not (tmp_path / "out").exists()


def test_a_loading_script_is_not_run(refused, tmp_path):
    made, folder = tmp_path / "made", tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"import pathlib; pathlib.Path({str(made)!r}).touch()")
    for given in (folder, folder / "rows.py"):
        refused("sft", str(given), train_file=given, output_dir=tmp_path / "out")
    assert not made.exists()


def with_code(source: Path, folder: Path, made: Path) -> Path:
    """A copy of a model that asks for Python code of its own."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoint-*", "manifest.json"))
    config = json.loads((folder / "config.json").read_text())
    classes = (
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    )
    config |= {
        "model_type": "evil",
        "auto_map": {name: "code.Model" for name in classes} | {"AutoConfig": "code.Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(made)!r}).touch()")
    return folder


@pytest.mark.parametrize("stage", ["sft", "collect", "rm", "ppo", "reward"])
def test_a_models_own_code_is_not_run(refused, mini, tmp_path, stage):
    made = tmp_path / "made"
    folder = with_code(mini.run / ("rm" if stage == "reward" else "sft"), tmp_path / "model", made)
    key = {"reward": f"[{{model: {folder}}}]"} if stage == "reward" else {"model_name_or_path": folder}
    refused(
        "ppo" if stage == "reward" else stage, "code of its own, which is never run", **key, output_dir=tmp_path / "out"
    )
    assert not made.exists()


def test_a_model_of_pickles_is_refused(refused, mini, tmp_path):
    shutil.copytree(
        mini.run / "sft", tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors")
    )
    torch.save({"a": Touch(tmp_path / "made")}, tmp_path / "model" / "pytorch_model.bin")
    refused("rm", "no weights as safetensors", model_name_or_path=tmp_path / "model", output_dir=tmp_path / "out")
    assert not (tmp_path / "made").exists()


SECRETS = {
    "HF_TOKEN": "hf_SENTINELaaaaaaaa",
    "WANDB_API_KEY": "SENTINEL" + "0" * 32,
    "OPENAI_API_KEY": "sk-SENTINELbbbbbb",
}


def test_tokens_and_keys_are_in_no_file_and_on_no_line(mini, tmp_path, monkeypatch, capfd):
    """Of the environment, and in a path with credentials, in all that a run with a tracker leaves."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    changes = {"train_file": "https://user:SENTINELpw@host/rows.jsonl"}
    assert main(["sft", *mini.arguments("sft", mini.run, output_dir=out, **changes)]) == 2  # no such scheme
    changes = {"report_to": "wandb", "num_train_epochs": 1}
    assert main(["sft", *mini.arguments("sft", mini.run, output_dir=out, **changes)]) == 0
    assert main(["sft", *mini.arguments("sft", mini.run, output_dir=out, hub_token="hf_SENTINELcccccccc")]) == 2
    said = capfd.readouterr()
    leaks = [path for path in out.rglob("*") if path.is_file() and b"SENTINEL" in path.read_bytes()]
    assert leaks == [] and (out / "manifest.json").exists()
    for value in (*SECRETS.values(), "hf_SENTINELcccccccc", "SENTINELpw"):
        assert value not in said.out + said.err


def test_names_from_data_files_are_no_paths(mini, tmp_path):
    """Ids, labelers, sources and prompts that look like paths: nothing is written beside the run's folder."""
    away = "../../../escaped"
    files = {}
    for name in ("train", "validation"):
        lines = (mini.run / "rankings" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [
            json.loads(line) | {"labeler": f"{away}-{i % 2}", "source": f"/{away}", "id": away}
            for i, line in enumerate(lines)
        ]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "a" / "b" / "c" / "out"
    changes = {"train_file": files["train"], "validation_file": files["validation"], "held_out_file": "null"}
    mini.stage("rm", mini.run, output_dir=out / "rm", **changes)
    mini.stage("rm", mini.run, output_dir=out / "folds", folds_by="labeler", num_folds=2, **changes)
    prompts = [
        json.loads(line) for line in (mini.run / "data" / "prompts_rm.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row | {"id": away, "source": away}) + "\n" for row in prompts), encoding="utf-8")
    mini.stage("collect", mini.run, prompts_file=path, output_dir=out / "rankings")
    beside = {path.name for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(out)}
    assert beside == {"train.jsonl", "validation.jsonl", "prompts.jsonl"}
    assert not any("escaped" in path.name for path in tmp_path.rglob("*"))
