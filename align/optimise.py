"""Optimisers by name (`optim`): the Trainer's own, and Muon for hidden matrices with AdamW for the rest."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from align.config import PPOConfig, RMConfig, SFTConfig
from align.errors import UserError
from align.runtime import full, part_like, sharding

LARGEST = 2**28  # numbers of one batch of matrices, so that sharded ones do not all lie whole at once
MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al.'s iteration: singular values to about 1 in five steps
NEWTON_SCHULZ_STEPS = 5
RMS = 0.2  # of an update's entries, so that AdamW's rates mean the same (Liu et al. 2025, arXiv 2502.16982)

HEADS = ("lm_head", "score")  # output heads: like embeddings, AdamW's


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in `dtype` (Jordan et al. 2024), a batch a shape; sharded matrices whole.

    torch.optim.Muon does this one matrix at a time and always in bfloat16, which is slow on a CPU that has no
    instructions for it.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, dtype: torch.dtype = torch.float32):
        super().__init__(params, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                together = max(1, LARGEST // shape.numel())
                for some in (params[i : i + together] for i in range(0, len(params), together)):
                    momenta = torch.stack([full(self._nesterov(p)) for p in some])  # (N, rows, columns)
                    directions = orthogonal(momenta, self.dtype).to(momenta.dtype)
                    steps = [part_like(direction, p) for direction, p in zip(directions, some, strict=True)]
                    torch._foreach_add_(some, steps, alpha=-group["lr"] * RMS * max(shape) ** 0.5)

    def _nesterov(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(p.grad, 1.0 - MOMENTUM)
        return p.grad.lerp(momentum, MOMENTUM)


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrices, about: singular values between 0.7 and 1.2, in `dtype`. (N, rows, columns)

    The iteration pulls singular values back from wherever rounding leaves them, so bfloat16 will do.
    """
    a, b, c = QUINTIC
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # (N, rows, rows), rows <= columns
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained two-dimensional weights that are neither embeddings (or tied to them) nor a head's."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and id(p) not in embeddings and not set(name.split(".")) & set(HEADS)
    }


class MuonAdamW(torch.optim.Optimizer):
    """Muon on two-dimensional hidden weights; AdamW on embeddings, heads, norms, biases.

    For small models trained in few steps: lower losses than AdamW alone reached in the same time (docs/LOG.md).
    """

    def __init__(
        self, model: nn.Module, muon_lr: float, adam_lr: float, betas: tuple[float, float], eps: float = 1e-8,
        bf16: bool = False,
    ):  # fmt: skip
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        hidden = hidden_matrices(model)
        rest = [p for name, p in named if name not in hidden]
        super().__init__([p for _, p in named], {})
        parts = []
        if hidden:
            parts.append(Muon(list(hidden.values()), muon_lr, torch.bfloat16 if bf16 else torch.float32))
        if rest:  # none when only adapters are trained
            parts.append(torch.optim.AdamW(rest, lr=adam_lr, betas=betas, eps=eps, weight_decay=0.0))
        self.parts = tuple(parts)
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # shared, so schedules reach

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def trainer_optimizer(model: nn.Module, config: SFTConfig | RMConfig) -> torch.optim.Optimizer | None:
    """A Trainer's optimiser: ours where the config asks for Muon, else None, and the Trainer makes its own of
    `trainer_optim`. The Trainer's schedule drives either; under Muon nothing decays."""
    require_whole(trainer_optim(config))
    if not takes_muon(config):
        optimizer_class(trainer_optim(config), config.learning_rate, config)  # what is not installed is told here
        return None
    rate = config.learning_rate if config.muon_learning_rate is None else config.muon_learning_rate
    betas = (config.adam_beta1, config.adam_beta2)
    return MuonAdamW(model, rate, config.learning_rate, betas, config.adam_epsilon, config.bf16)


def require_whole(optim: str) -> None:
    """Refuses optimisers whose steps need whole matrices where each process has a part of them."""
    if optim in ("adafactor", "adamw_8bit") and sharding():
        raise UserError(f"optim: {optim} needs whole matrices, not shards; use adamw_torch_fused or muon")


def trainer_optim(config: SFTConfig | RMConfig) -> str:
    """TrainingArguments' `optim`, which a Trainer reads unless it is given an optimiser."""
    return "adamw_torch_fused" if config.optim is None or takes_muon(config) else config.optim


def takes_muon(config: SFTConfig | RMConfig) -> bool:
    return config.optim == "muon" or config.muon_learning_rate is not None


def make_optimizer(model: nn.Module, rate: float, config: PPOConfig) -> torch.optim.Optimizer:
    """Stage 3's optimiser of what is trained in `model`; nothing decays. Muon and its AdamW take the same rate."""
    if config.optim == "muon":
        betas = (config.adam_beta1, config.adam_beta2)
        return MuonAdamW(model, rate, rate, betas, config.adam_epsilon, config.bf16)
    kind, options = optimizer_class(config.optim, rate, config)
    return kind([p for p in model.parameters() if p.requires_grad], weight_decay=0.0, **options)


def optimizer_class(optim: str, rate: float, config: PPOConfig | SFTConfig | RMConfig) -> tuple[type, dict[str, Any]]:
    """The class a Trainer would take, and what it would give it besides parameters and decay."""
    arguments = SimpleNamespace(
        optim=OptimizerNames(optim), optim_args=None, learning_rate=rate,
        adam_beta1=config.adam_beta1, adam_beta2=config.adam_beta2, adam_epsilon=config.adam_epsilon,
    )  # fmt: skip
    try:
        return Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError:
        package = "torchao" if optim == "adamw_torch_8bit" else "bitsandbytes"
        raise UserError(f"optim: {optim}: needs {package}, which is not installed: pip install {package}") from None
