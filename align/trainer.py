"""What the stages driven by a transformers or TRL Trainer share: arguments, resume, the ranking trainer."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer

from align.checkpoint import checkpoint_folder, load_training_state, rotate
from align.config import RMConfig, SFTConfig, TrainerConfig
from align.errors import UserError
from align.files import write_json
from align.interrupt import Interrupted, arrived, deferred
from align.lora import adapter_config, require_same_adapter
from align.maths.logprobs import token_logprobs
from align.optimise import trainer_optimizer
from align.packing import PackCollator, set_packed
from align.postmortem import StopsAtNaN
from align.ranking import batch_ranking_loss, held_out_loss
from align.runtime import Shards, is_distributed, is_main_process, load_optimizer_state, on_cpu, sharding, whole_state
from align.text import CausalCollator
from align.track import Metrics, MetricsCallback, announce, save_log_sizes


def common_arguments(config: TrainerConfig, output: Path) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments (or TRL's SFTConfig) that follow from any of their stages' config."""
    return {
        "output_dir": str(output),
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": config.bf16,
        "use_cpu": on_cpu(),
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,  # StopsAtNaN wants to see them
        "save_total_limit": config.save_total_limit,
        "report_to": "none",  # MetricsCallback reports
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu(),
        "disable_tqdm": None,
    }


def refuse_several_gpus() -> None:
    """Raises UserError where one process sees several: a Trainer would copy the model to each (DataParallel), which
    neither packs nor losses are made for."""
    gpus = 0 if on_cpu() else torch.cuda.device_count()
    if gpus > 1 and not is_distributed():
        how = f"start one a GPU, `accelerate launch --num_processes {gpus} -m stages...`, or set CUDA_VISIBLE_DEVICES=0"
        raise UserError(f"launcher: one process sees {gpus} GPUs; {how}")


def rate_arguments(config: SFTConfig | RMConfig) -> dict[str, Any]:
    """The rate, its schedule and the decay. The paper's is a cosine to 10% of peak without either (App. C.1, C.2)."""
    schedule, warmup = config.lr_scheduler_type, config.warmup_steps
    return {
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if schedule == "constant" and warmup else schedule,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1} if schedule == "cosine_with_min_lr" else None,
        "warmup_steps": warmup,
        "weight_decay": config.weight_decay,
    }


def metrics_callback(config: TrainerConfig, output: Path, checkpoint: Path | None) -> MetricsCallback:
    return MetricsCallback(Metrics(output, checkpoint, config))


def causal_collator(model: torch.nn.Module, attn_implementation: str | None, pad_id: int) -> Callable:
    """Packs, which `model` is set to read; padded rows where it cannot, or another attention is named."""
    if attn_implementation is not None or not set_packed(model):
        return CausalCollator(pad_id)
    rates = [getattr(model.config, name, None) for name in ("attention_dropout", "attn_pdrop")]
    if any(rates):
        announce("attention dropout is off: packs have none; name an attn_implementation to train with it")
    return PackCollator(pad_id)


def resume_argument(checkpoint: Path | None) -> str | None:
    return str(checkpoint) if checkpoint else None


class LengthGroups(Sampler):
    """Rows of like length in one global batch, so that little is padding; the same for any number of processes.

    The last `fillers` indices are of rows that teach nothing.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, fillers: int = 0):
        self.lengths, self.batch_size, self.seed, self.fillers, self.epoch = lengths, batch_size, seed, fillers, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # It hands out each window's longest batch first, so that neighbouring steps see like rows: mix the batches.
        whole = len(rows) // self.batch_size * self.batch_size
        order = torch.randperm(whole // self.batch_size, generator=generator).tolist()
        starts = [self.batch_size * i for i in order]
        yield from (row for start in starts for row in rows[start : start + self.batch_size])
        yield from rows[whole:]
        yield from range(len(rows), len(rows) + self.fillers)


class Filled(Dataset):
    """Rows, and after them fillers up to a multiple of `size`."""

    def __init__(self, rows: Any, filler: Any, size: int):
        self.rows, self.filler, self.size = rows, filler, size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size) * self.size

    def __getitem__(self, index: int) -> Any:
        return self.rows[index] if index < len(self.rows) else self.filler


class GroupedByLength:
    """Mixed into a Trainer: training batches come from `LengthGroups`, and several processes see what one would.

    accelerate fills an epoch's last batches up with rows from its start, so that each process has as many: those rows
    would be learned twice, and the batch's mean would be another. Here they are filled up with rows that teach nothing.
    """

    def get_train_dataloader(self) -> DataLoader:
        rows, size = self.train_dataset, self.args.train_batch_size * self.args.world_size
        if self.args.world_size == 1 or len(rows) % size == 0:
            return super().get_train_dataloader()
        self.train_dataset = Filled(rows, self.filler(rows[0]), size)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        real = rows.rows if isinstance(rows, Filled) else rows
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.order = LengthGroups(self.lengths(real), size, self.args.seed, fillers=len(rows) - len(real))
        return self.order

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        self.order.set_epoch(epoch)  # where several processes skip what a checkpoint has seen, accelerate does not
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    @staticmethod
    def lengths(rows: Any) -> list[int]:
        """Tokens of each element."""
        return [len(ids) for ids in rows["input_ids"]]

    @staticmethod
    def filler(row: dict) -> dict:
        """One token that nothing is learned from."""
        return {"input_ids": row["input_ids"][:1], "labels": [-100], "filler": True}


class LossPerToken:
    """Mixed into a Trainer of a language model: `eval_loss` is the mean over tokens, however they are batched.

    The Trainer's own is a mean of batch means, which the batch size and the number of processes change.
    """

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self.nll, self.tokens = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = self.nll / max(1, self.tokens)
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logprobs = self.label_logprobs(model, inputs)
        nll, learned = by_row(-logprobs, inputs), by_row(inputs["labels"][:, 1:] != -100, inputs)  # (B,), (B,)
        sums, counts = self.accelerator.gather_for_metrics((nll, learned))  # without the rows that fill up
        self.nll, self.tokens = self.nll + float(sums.sum()), self.tokens + int(counts.sum())
        return sums.sum() / counts.sum().clamp(min=1), None, None


def by_row(numbers: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Sums over each row's predicted tokens, of padded rows or a pack. (B, T - 1) or (1, N - 1) -> (B,), float64"""
    if "layout" not in inputs:
        return numbers.double().sum(1)
    totals = torch.nn.functional.pad(numbers[0].double().cumsum(0), (1, 0))  # (N,)
    starts = inputs["layout"].starts  # in the caller's order; a row of L tokens predicts L - 1 from its start on
    lengths = torch.tensor([row.length for row in inputs["layout"].rows], device=starts.device)
    return totals[starts + lengths - 1] - totals[starts]


class ResumesExactly:
    """Mixed into a Trainer: checkpoints are whole or absent, hold what the next row of the log is summed up from, and
    are saved when a signal asks the run to end.

    The Trainer itself writes them file by file, forgets the sums, and takes one more step when it resumes a run that
    had taken its last within an epoch.
    """

    running = ("totals", "_metrics")  # sums of RankingTrainer's and of TRL's log
    saving: str | None = None  # the folder of the checkpoint folder that is being written
    resumed: Path | None = None  # the checkpoint whose sums are still to be loaded

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        self.resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with deferred():
            return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.load_sums()
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _finalize_training(self, *args: Any) -> Any:
        self.load_sums()  # where no epoch was left to run
        return super()._finalize_training(*args)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """At the end of a step and of an epoch. A checkpoint between the two would leave out the epoch's evaluation."""
        signal = arrived()
        last_step = self.control.should_training_stop or self.state.epoch == int(self.state.epoch)
        if self.args.eval_strategy == "epoch" and last_step and not self.control.should_evaluate:
            signal, self.control.should_save = 0, False
        elif signal:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if signal:
            raise Interrupted(signal, self.checkpoint_path())

    def checkpoint_path(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _get_output_dir(self, trial: Any) -> str:
        return self.saving or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = self.checkpoint_path()
        with checkpoint_folder(path) as folder:
            self.saving = str(folder.parent)
            super()._save_checkpoint(model, trial)
            self.saving = None
            self.save_sums(folder)
            if is_main_process():
                save_log_sizes(path.parent, folder)
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody reads
        rotate(path, self.args.save_total_limit, self.kept())

    def kept(self) -> list[Path]:
        """Checkpoints that are more than a place to resume from."""
        return []

    def save_sums(self, folder: Path) -> None:
        sums = {name: getattr(self, name) for name in self.running if hasattr(self, name)}
        sums |= {"loss": float(self._tr_loss), "logged": self._globalstep_last_logged}
        write_json(folder / f"sums-{self.args.process_index}.json", sums)

    def load_sums(self) -> None:
        """This process's. All are alike but the loss, whose mean is logged: another number of processes takes that."""
        checkpoint, self.resumed = self.resumed, None
        if checkpoint is None:
            return
        files = [checkpoint / f"sums-{i}.json" for i in range(len(list(checkpoint.glob("sums-*.json"))))]
        all_sums = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        same = len(all_sums) == self.args.world_size
        mine = all_sums[self.args.process_index if same else 0]
        self._tr_loss += mine["loss"] if same else sum(sums["loss"] for sums in all_sums) / len(all_sums)
        self._globalstep_last_logged = mine["logged"]
        if "totals" in mine:
            self.totals = mine["totals"]
        for mode, lists in mine.get("_metrics", {}).items():
            self._metrics[mode].update(lists)


class Sharded:
    """Mixed into a Trainer, whose optimiser `config` names if given. Under FSDP2 the model lies in parts over the
    processes; its checkpoints are those of one process, and resume in any number of them.

    transformers is told that it has sharded the model itself at loading: such a model it trains without wrapping it. It
    would not save such a model's optimiser, which is what most methods here do instead.
    """

    def __init__(self, *args: Any, config: SFTConfig | RMConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.config, self.shards = config, None
        if is_deepspeed_zero3_enabled():
            raise UserError("launcher: a stage needs its model whole at the end, which ZeRO-3 does not give; use fsdp2")
        if sharding():
            half = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the launcher's word counts too
            dtype = half.get(self.accelerator.mixed_precision, torch.float32)
            self.shards = Shards(self.model, self.args.device, dtype)
            self.is_distributed_loading_by_transformers = True

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not sharding():  # else it need not fit there whole
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.config is not None:
            self.optimizer = trainer_optimizer(self.model, self.config)
        return super().create_optimizer(model)

    def finished_model(self) -> torch.nn.Module:
        """The trained model as an ordinary one, in every process. Training is over: the optimiser makes room for it."""
        if self.shards is None:
            return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()
        return self.shards.put_together()

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager:
        return nullcontext()  # reduced in every microbatch, so that no process keeps whole gradients

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        lora = adapter_config(self.model)
        if lora is not None and self.args.should_save:
            lora.save_pretrained(output_dir or self.args.output_dir)  # a scalar model's weights do not say its scale
        if self.shards is None:
            return super()._save(output_dir, state_dict)
        with self.shards.for_saving() as whole, instead(self, "model", whole):
            if self.args.should_save:
                super()._save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        require_same_adapter(self.model, Path(resume_from_checkpoint))
        if self.shards is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with self.shards.for_loading() as whole:
            super()._load_from_checkpoint(resume_from_checkpoint, whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.shards is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        whole = whole_state(self.optimizer.state_dict())
        with instead(self, "optimizer", SimpleNamespace(state_dict=lambda: whole)):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.shards is None or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer_state(self.optimizer, load_training_state(checkpoint, "optimizer.pt"))
        self.lr_scheduler.load_state_dict(load_training_state(checkpoint, "scheduler.pt"))


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Meanwhile `owner` has another `name`."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


class LanguageModelTrainer(ResumesExactly, StopsAtNaN, LossPerToken, GroupedByLength, Trainer):
    """transformers' Trainer, batches grouped by length."""

    def label_logprobs(self, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        """Of every label but the first column, 0 where there is none. (B, T - 1)"""
        targets = inputs["labels"][:, 1:]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]
        return token_logprobs(logits, targets.clamp(min=0)).masked_fill(targets == -100, 0.0)


class DemonstrationTrainer(ResumesExactly, Sharded, StopsAtNaN, LossPerToken, GroupedByLength, SFTTrainer):
    """TRL's SFTTrainer, batches grouped by length."""

    def label_logprobs(self, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        """Of every label but the first column, 0 where there is none; no logits are kept. (B, T - 1)"""
        return model(**inputs, fused_lm_head=True).log_probs

    def let_go(self) -> None:
        """Training is over, and every epoch on the disk: weights and optimiser make room."""
        handler = self.callback_handler
        self.model = self.model_wrapped = self.optimizer = self.lr_scheduler = None
        handler.model = handler.optimizer = handler.lr_scheduler = None
        self.accelerator.free_memory()

    def kept(self) -> list[Path]:
        """Those at an epoch's end, of which one becomes the policy."""
        steps = [row["step"] for row in self.state.log_history if "eval_loss" in row]
        return [Path(self.args.output_dir) / f"checkpoint-{step}" for step in steps]


class SaveEachEpoch(TrainerCallback):
    """A checkpoint at the end of each epoch, whatever else is saved."""

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> TrainerControl:
        control.should_save = True
        return control


class OwnDropout(TrainerCallback):
    """Each process draws its own masks. The first one's stay those of a run alone; a resume brings back each one's."""

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if args.process_index:
            set_seed(args.seed + args.process_index)


class RankingTrainer(ResumesExactly, Sharded, StopsAtNaN, GroupedByLength, Trainer):
    """A Trainer whose batch element is a prompt: losses are summed and divided by the step's prompts, all processes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, not by accumulation steps
        self.totals: dict[str, float] = {}

    @staticmethod
    def lengths(rows: list[dict]) -> list[int]:
        return [element["ranking"].tokens for element in rows]

    @staticmethod
    def filler(element: dict) -> dict:
        """Two short completions, tied."""
        ranking = element["ranking"]
        short = ranking.responses[0][-1:]
        return {"ranking": replace(ranking, query=ranking.query[:1], responses=(short,) * 2, ranks=(0, 0), filler=True)}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        prompts = sum(batch["prompts"] for batch in batch_samples)
        return self.accelerator.gather(torch.as_tensor(prompts, device=device)).sum()

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, stats = batch_ranking_loss(model, inputs)
        prompts = inputs["prompts"] if num_items_in_batch is None else num_items_in_batch
        loss = loss / prompts
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes
        sums = self.accelerator.gather(torch.stack(list(stats.values()))[None]).sum(0)  # of all processes, at one go
        for name, value in zip(stats, sums.tolist(), strict=True):
            self.totals[name] = self.totals.get(name, 0.0) + value
        return (loss, None) if return_outputs else loss

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Held-out loss and accuracy by prompt, whatever an element of training is."""
        size, pad_id = self.args.per_device_eval_batch_size, self.data_collator.pad_id
        with self.compute_loss_context_manager():
            found = held_out_loss(self.model, self.eval_dataset, pad_id, size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.totals.get("pairs"):
            logs["accuracy"] = self.totals["correct"] / self.totals["pairs"]
            logs["margin"] = self.totals["margin"] / self.totals["pairs"]
            self.totals = {}
        super().log(logs, start_time)


class PairTrainer(RankingTrainer):
    """A RankingTrainer whose elements are shuffled: grouped by length, a prompt's pairs would meet again."""

    @staticmethod
    def lengths(rows: list[dict]) -> list[int]:
        return [1] * len(rows)
