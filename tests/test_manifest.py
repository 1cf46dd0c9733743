"""align/manifest.py: hashes, manifests, parents."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from align.errors import UserError
from align.files import sha256_file
from align.manifest import (
    check_parent,
    code_version,
    read_manifest,
    redact,
    tokenizer_sha256,
    weights_sha256,
    write_manifest,
)
from align.rows import DataReport
from tests.folders import finished, model


def test_weights_sha256_is_the_files_own_and_sees_one_changed_number(tmp_path):
    assert weights_sha256(tmp_path) is None and weights_sha256(tmp_path / "none") is None
    model(tmp_path, 1.0)
    first = weights_sha256(tmp_path)
    assert first == sha256_file(tmp_path / "model.safetensors")
    model(tmp_path, 1.5)
    second = weights_sha256(tmp_path)
    save_file({"v": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    assert len({first, second, weights_sha256(tmp_path)}) == 3


def test_tokenizer_sha256_ignores_what_the_last_call_left_behind(tmp_path):
    base = {"model": {"vocab": {"a": 0}}, "truncation": None, "padding": None}
    one = tokenizer_sha256(model(tmp_path / "a", tokenizer=base))
    assert one == tokenizer_sha256(model(tmp_path / "b", tokenizer=base | {"truncation": {"max_length": 3}}))
    assert one != tokenizer_sha256(model(tmp_path / "c", tokenizer=base | {"model": {"vocab": {"b": 0}}}))
    slow = tmp_path / "slow"
    slow.mkdir()
    assert tokenizer_sha256(slow) is None
    (slow / "vocab.json").write_text("{}")
    assert len(tokenizer_sha256(slow)) == 64
    (tmp_path / "c" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is torn"):
        tokenizer_sha256(tmp_path / "c")


def test_tokenizer_sha256_survives_a_round_trip(tmp_path, tiny_codec):
    from align.text import Codec

    tiny_codec.save(tmp_path / "a")
    again = Codec.load(str(tmp_path / "a"))
    again.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    again.save(tmp_path / "b")
    assert sha256_file(tmp_path / "a/tokenizer.json") != sha256_file(tmp_path / "b/tokenizer.json")
    assert tokenizer_sha256(tmp_path / "a") == tokenizer_sha256(tmp_path / "b")


@dataclass(frozen=True)
class Config:
    output_dir: str = "runs/x"
    max_new_tokens: int = 24
    hub_token: str = "hf_abcdefghijkl"
    learning_rate: float = 1e-3


def test_manifest_round_trip(tmp_path):
    model(tmp_path)
    parents = [{"role": "model_name_or_path", "path": "a", "weights_sha256": "1", "tokenizer_sha256": "2"}]
    report = DataReport(("d.jsonl",), 3, 2, {"d.jsonl": "f" * 64}, {"empty_field": 1})
    wrote = write_manifest(tmp_path, "sft", Config(), 7, parents, {"train": report}, {"loss": torch.tensor(0.5)})
    read = read_manifest(tmp_path)
    assert read == wrote and read.schema == 1 and read.stage == "sft" and read.seed == 7
    assert read.data["train"]["dropped"] == {"empty_field": 1} and read.data["train"]["rows_used"] == 2
    assert read.metrics == {"loss": 0.5} and read.parents == parents
    assert read.weights_sha256 == weights_sha256(tmp_path)
    assert read.tokenizer_sha256 == tokenizer_sha256(tmp_path)
    assert read.config == {
        "output_dir": "runs/x", "max_new_tokens": 24, "hub_token": "[redacted]", "learning_rate": 1e-3,
    }  # fmt: skip
    assert {"align", "code", "python", "torch", "transformers", "trl", "accelerate", "peft"} <= set(read.versions)
    assert read.versions["torch"] == torch.__version__


def test_secrets_are_redacted_and_nothing_else():
    config = {
        "hf_token": "x", "WANDB_API_KEY": "x", "password": "x", "clientSecret": "x", "apikey": "x", "tokens": ["x"],
        "env": {"AUTH": "x", "keys": {"a": "x"}}, "url": "https://me:pw@host/x", "note": "use hf_abcdefghijklmnop",
    }  # fmt: skip
    assert '"x"' not in json.dumps(redact(config)) and "pw" not in json.dumps(redact(config))
    assert "abcdefgh" not in json.dumps(redact(config))
    kept = {
        "max_new_tokens": 24,
        "tokenizer_name": "t",
        "hub_token": None,
        "monkey": "m",
        "save": [1, "a"],
        "token": "",
    }
    assert redact(kept) == kept


def test_manifests_that_cannot_be_used(tmp_path):
    assert read_manifest(tmp_path) is None and read_manifest("org/name") is None
    path = tmp_path / "manifest.json"
    for content, message in (
        ("{", "is torn"), ("[]", "is no manifest"), ('{"schema": 1}', "is no manifest"),
        ('{"stage": "sft"}', "is no manifest"),
        ('{"schema": 2, "stage": "sft"}', "has schema 2, this version reads 1"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_manifest(tmp_path)
    path.write_text('{"schema": 1, "stage": "sft", "added_later": 1}')
    assert read_manifest(tmp_path).stage == "sft"


def test_code_version_names_a_commit_or_nothing():
    assert code_version() is None or len(code_version().removesuffix("-dirty")) == 40


def test_a_fitting_parent_gives_its_manifest_entry(tmp_path):
    path = str(finished(tmp_path / "sft"))
    assert check_parent(path, "model_name_or_path", ("base", "sft")) == {
        "role": "model_name_or_path", "path": path, "stage": "sft",
        "weights_sha256": weights_sha256(path), "tokenizer_sha256": tokenizer_sha256(path),
    }  # fmt: skip


def test_foreign_models_are_taken_without_a_stage(tmp_path):
    entry = check_parent(str(model(tmp_path / "m")), "model_name_or_path", ("sft",))
    assert entry["stage"] is None and entry["weights_sha256"]
    hub = check_parent("org/name", "model_name_or_path", ("sft",))
    assert hub == {"role": "model_name_or_path", "path": "org/name", "stage": None, "weights_sha256": None,
                   "tokenizer_sha256": None}  # fmt: skip


def test_wrong_stage_is_refused_by_name(tmp_path):
    path = finished(tmp_path / "rm", "rm")
    with pytest.raises(
        UserError, match=rf"^model_name_or_path: {path}: comes from stage rm: give .* stage sft or base"
    ):
        check_parent(str(path), "model_name_or_path", ("sft", "base"))


def test_changed_weights_and_tokenizer_are_refused(tmp_path):
    path = finished(tmp_path / "sft")
    save_file({"w": torch.tensor([0.0, 0.0, 0.0, 1e-7])}, path / "model.safetensors")
    with pytest.raises(UserError, match="its weights changed since its manifest was written: run `make sft` again"):
        check_parent(str(path), "reward_model_path", ("sft",))
    for change in (lambda file: file.write_text('{"a": 1}'), lambda file: file.unlink()):
        path = finished(tmp_path / "config")
        change(path / "config.json")
        (path / "adapter_config.json").write_text("{}")  # so that it still is a model
        with pytest.raises(UserError, match=r"config: config\.json (changed|is missing) since its manifest"):
            check_parent(str(path), "model_name_or_path", ("sft",))
    path = finished(tmp_path / "other")
    (path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="its tokenizer changed"):
        check_parent(str(path), "reward_model_path", ("sft",))


@pytest.mark.parametrize("path", ["runs/none/sft", "./a/b", "/a/b", "word", "a/b/c", "tests/none"])
def test_missing_local_checkpoints(path):
    with pytest.raises(UserError, match=f"^role: {path}: no such checkpoint: run `make sft` first or give its path"):
        check_parent(path, "role", ("sft",))
    with pytest.raises(UserError, match="^role: missing"):
        check_parent("", "role")


def test_incomplete_checkpoints(tmp_path):
    path = model(tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_parent(str(tmp_path / "file"), "role")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    with pytest.raises(UserError, match="no model-00002.safetensors"):
        check_parent(str(path), "role")
    (path / "model.safetensors.index.json").unlink()
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-3])
    with pytest.raises(UserError, match="model.safetensors is torn"):
        check_parent(str(path), "role")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights as safetensors"):
        check_parent(str(path), "role")
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        check_parent(str(path), "role")
