"""align/optimise.py: our Muon takes torch's steps, in float32."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers.optimization import Adafactor

import align.optimise
import stages.rm
import stages.sft
from align.config import OPTIMIZERS, ModelTerm, PPOConfig, RMConfig, SFTConfig
from align.errors import UserError
from align.optimise import (
    Muon,
    MuonAdamW,
    hidden_matrices,
    make_optimizer,
    orthogonal,
    trainer_optim,
    trainer_optimizer,
)


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_orthogonal_flattens_the_singular_values_and_keeps_their_vectors(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(x, torch.float32))
    assert values.min() > 0.3 and values.max() < 1.3 and values.median() > 0.65
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonal(x, torch.float32) @ v.mT  # diagonal: each singular vector stays one
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_muon_takes_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    ours = nn.ParameterList([torch.randn(24, 24), torch.randn(24, 24), torch.randn(24, 60), torch.randn(60, 24)])
    theirs = nn.ParameterList([p.detach().clone() for p in ours])
    start = [p.detach().clone() for p in ours]
    one = Muon(list(ours), lr=0.02)
    two = torch.optim.Muon(list(theirs), lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        moved, expected = p.detach() - before, q.detach() - before
        assert (moved - expected).norm() < 0.02 * expected.norm()  # theirs is computed in bfloat16


def test_matrices_in_several_batches_take_the_same_steps(monkeypatch):
    torch.manual_seed(0)
    together = nn.ParameterList([torch.randn(12, 20) for _ in range(5)])
    apart = copy.deepcopy(together)
    for params, largest in ((together, 2**28), (apart, 2 * 12 * 20)):
        monkeypatch.setattr(align.optimise, "LARGEST", largest)
        optimizer = Muon(list(params), 0.1)
        for p in params:
            p.grad = p.detach().sin()
        optimizer.step()
    for p, q in zip(together, apart, strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert not torch.equal(together[0], together[1])


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    parts = {"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "score": nn.Linear(4, 1)}
    model = nn.ModuleDict(parts)
    muon, adamw = MuonAdamW(model, 1e-2, 1e-3, (0.9, 0.95)).parts
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(model["linear"].weight)]
    assert sum(len(group["params"]) for group in adamw.param_groups) == 6


def test_embeddings_are_known_by_their_module_not_their_name():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    )  # wte, wpe, tied head
    assert {name.split(".")[-2] for name in hidden_matrices(model)} == {"c_attn", "c_proj", "c_fc"}


def test_muon_resumes_where_it_was():
    def train(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(3, 4, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = MuonAdamW(whole, 1e-2, 1e-2, (0.9, 0.95))
    train(whole, optimizer, range(3))
    again = copy.deepcopy(whole)
    state = copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, range(3, 6))
    other = MuonAdamW(again, 1e-2, 1e-2, (0.9, 0.95))
    other.load_state_dict(state)
    train(again, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("config_class", [SFTConfig, RMConfig])
def test_a_trainer_keeps_its_adamw_unless_muon_gets_a_rate(config_class):
    model = nn.ModuleDict({"linear": nn.Linear(4, 4)})
    assert trainer_optimizer(model, config_class("out")) is None
    optimizer = trainer_optimizer(model, config_class("out", muon_learning_rate=1e-2, learning_rate=1e-3))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert optimizer.parts[1].defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("config_class", [SFTConfig, RMConfig])
def test_optim_names_what_the_trainer_makes(config_class):
    model = nn.ModuleDict({"linear": nn.Linear(4, 4)})
    assert trainer_optim(config_class("out")) == TrainingArguments("out").optim == "adamw_torch_fused"
    assert trainer_optim(config_class("out", optim="adafactor")) == "adafactor"
    assert trainer_optimizer(model, config_class("out", optim="adafactor")) is None
    stage = {SFTConfig: stages.sft, RMConfig: stages.rm}[config_class]
    assert stage.training_arguments(config_class("out", optim="adafactor"), Path("out")).optim == "adafactor"
    optimizer = trainer_optimizer(model, config_class("out", optim="muon", learning_rate=1e-3))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3], "no rate of its own: AdamW's"


def ppo_config(**changes) -> PPOConfig:
    return PPOConfig("out", reward=(ModelTerm("r"),), ptx_coef=0.0, **changes)


def stepped(make) -> list[torch.Tensor]:
    """Weights after three steps on fixed gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    optimizer = make(model)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "optim, expected",
    [
        ("adamw_torch_fused", lambda p: torch.optim.AdamW(p, 1e-2, (0.9, 0.95), 1e-5, weight_decay=0.0, fused=True)),
        ("adamw_torch", lambda p: torch.optim.AdamW(p, 1e-2, (0.9, 0.95), 1e-5, weight_decay=0.0)),
        ("adafactor", lambda p: Adafactor(p, lr=1e-2, scale_parameter=False, relative_step=False, weight_decay=0.0)),
    ],
)
def test_stage_3_takes_the_libraries_steps(optim, expected):
    ours = stepped(lambda model: make_optimizer(model, 1e-2, ppo_config(optim=optim)))
    theirs = stepped(lambda model: expected(list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ppo_config().optim == "adamw_torch_fused"


def test_stage_3_gives_muon_the_hidden_matrices_and_frozen_weights_to_nobody():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    model[2].requires_grad_(False)
    muon, adamw = make_optimizer(model, 3e-3, ppo_config(optim="muon")).parts
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model[0].weight)]
    assert [len(g["params"]) for g in adamw.param_groups] == [3] and adamw.defaults["eps"] == 1e-5
    assert muon.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == 3e-3
    plain = make_optimizer(model, 3e-3, ppo_config())
    assert [len(group["params"]) for group in plain.param_groups] == [4]


@pytest.mark.parametrize("optim, package", [("adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")])
def test_an_optimiser_that_is_not_installed_is_told_in_one_line(monkeypatch, optim, package):
    assert optim in OPTIMIZERS
    monkeypatch.setattr(f"transformers.trainer_optimizer.is_{package}_available", lambda *_: False)
    model = nn.Linear(2, 2)
    makers = (
        lambda: make_optimizer(model, 1e-3, ppo_config(optim=optim)),
        lambda: trainer_optimizer(model, SFTConfig("out", optim=optim)),
        lambda: trainer_optimizer(model, RMConfig("out", optim=optim)),
    )
    for make in makers:
        with pytest.raises(UserError, match=f"optim: {optim}: needs {package}, .*pip install {package}"):
            make()
