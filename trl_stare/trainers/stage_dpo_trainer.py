"""Preference optimisation by stage: TRL's `DPOTrainer`, with pairs of trajectory segments in place of texts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from trl_stare.data.collators import PAIR_FEATURES, PreferenceCollator
from trl_stare.data.pairs import WHOLE_OBJECTIVES, WHOLE_TRAJECTORY
from trl_stare.interfaces import VLAPolicy
from trl_stare.losses import centered_scores, stage_preference_loss
from trl_stare.trainers._compat import (
    EndsAtMaxSteps,
    SavesAdapterConfig,
    forward_once,
    give_generation_config,
    keep_forward,
    restore_weights,
    use_adapter,
)
from trl_stare.trainers.adapters import require_trainable
from trl_stare.trainers.sharding import are_divided, most_of_all
from trl_stare.trainers.stage_dpo_card import write_preference_card
from trl_stare.trainers.stage_dpo_config import SUMMED, StageDPOConfig
from trl_stare.trainers.stage_dpo_metrics import pair_metrics
from trl_stare.trainers.stage_dpo_reference import (
    REFERENCE_COLUMNS,
    cache_folder,
    read_scores,
    reference_key,
    write_scores,
)


class StageDPOTrainer(EndsAtMaxSteps, SavesAdapterConfig, DPOTrainer):
    """
    Trainer for StA-TPO (STARE-VLA, arXiv 2512.05107): DPO on one stage of two trajectories at a time.

    What differs from [`~trl.DPOTrainer`]: a row is a pair of segments ([`pairs_dataset`]); a side's score is the mean
    (or sum) over its environment steps of the log-likelihood of what was done, the mean times the chunk's `C` steps; the
    loss is [`stage_preference_loss`]. The reference is the policy as it is when the trainer is made, or `ref_policy`; its
    scores are computed then, once, and kept for the next run on the same pairs ([`StageDPOConfig`]'s `ref_cache_dir`).

    Args:
        policy ([`VLAPolicy`]): what is trained: its `model` is a [`~transformers.PreTrainedModel`] (or a `PeftModel`).
        args ([`StageDPOConfig`]): the configuration.
        train_dataset ([`~datasets.Dataset`]), eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): rows of
            [`pairs_dataset`].
        ref_policy ([`VLAPolicy`], *optional*): another reference. To resume, make the trainer with the same reference
            as at first, i.e. with the checkpoint that training began from.
        callbacks, optimizers, peft_config (*optional*): as in [`~trl.DPOTrainer`].

    Logged: TRL's `rewards/chosen|rejected|margins|accuracies` (`beta` times the gain over the reference, without
    costs) and `logps/chosen|rejected` (the scores), and each stage's own `stage/{name}/...`, see [`pair_metrics`].

    Several processes: DDP and DeepSpeed ZeRO-2 and ZeRO-3 give the losses of one process at an equal global batch
    (tests with two processes on a CPU). FSDP, GPUs and several machines have not been run yet.

    Raises:
        ValueError: if the rows are not stage pairs, are none, or do not fit the objective, or if there is nothing to train.

    Example:
        ```python
        >>> pairs = build_pairs(trajectories, get_plan("StackCube-v1")).pairs
        >>> args = StageDPOConfig("preference", step_micro_batch_size=32)
        >>> trainer = StageDPOTrainer(policy, args, pairs_dataset(trajectories, pairs))
        >>> trainer.train()
        ```
    """

    _tag_names = ["trl", "trl-stare", "sta-tpo"]
    _name = "StA-TPO"
    _paper = {"title": "STARE-VLA: Stage-Aware Reinforcement", "id": "2512.05107"}

    def __init__(
        self,
        policy: VLAPolicy,
        args: StageDPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        *,
        ref_policy: VLAPolicy | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: Any = None,
    ):
        if not isinstance(args, StageDPOConfig):
            raise TypeError(f"`args` must be a StageDPOConfig, got {type(args).__name__}.")
        # the parent looks at the first row before it asks us to prepare any
        _require_pairs("train", train_dataset)
        require_trainable(policy.model, peft_config)
        # the parent's constructor comes back to these (`_prepare_dataset`, `compute_ref_log_probs`)
        self.policy, self.ref_policy = policy, ref_policy
        self.stage_names: list[str] = []
        self._records: dict[str, list[Tensor]] = {"train": [], "eval": []}
        with contextlib.ExitStack() as stack:
            for kept in (policy, ref_policy):
                if kept is not None:
                    model = kept.model.get_base_model() if is_peft_model(kept.model) else kept.model
                    stack.enter_context(keep_forward(model))
                    give_generation_config(model)
            super().__init__(
                model=policy.model,
                ref_model=None if ref_policy is None else ref_policy.model,
                args=args,
                data_collator=PreferenceCollator(policy.prepare, policy.chunk_size),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=policy.processor,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        policy.model = self.model  # with the adapter of `peft_config` around it
        if self._precompute_engine is not None:
            # its hooks would stay on the modules and lose count of the training engine's forwards (ZeRO-3)
            self._precompute_engine.destroy()
            self._precompute_engine = None
        if args.centered:
            self._keep_reference()

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: StageDPOConfig, dataset_name: str
    ) -> Dataset:
        """Check the rows. Reference scores they may carry are another trainer's: dropped."""
        _require_pairs(dataset_name, dataset)
        missing = [name for name in PAIR_FEATURES if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"`{dataset_name}_dataset` must have the columns of `pairs_dataset`, got none of {missing}."
            )
        stages = dict(zip(dataset["stage_name"], dataset["stage"], strict=True))
        whole = args.objective in WHOLE_OBJECTIVES
        if any((name == WHOLE_TRAJECTORY) != whole for name in stages):
            raise ValueError(
                f"`{dataset_name}_dataset` must hold pairs for {args.objective!r}, got stages {sorted(stages)}. "
                f"Build them with `build_pairs(..., objective={args.objective!r})`."
            )
        if args.stage_weights is not None and max(stages.values()) >= len(args.stage_weights):
            raise ValueError(f"`stage_weights` must have a weight for each of {stages}, got {args.stage_weights}.")
        self.stage_names += [name for name in sorted(stages, key=stages.get) if name not in self.stage_names]
        return dataset.remove_columns([name for name in REFERENCE_COLUMNS if name in dataset.column_names])

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*PAIR_FEATURES, *REFERENCE_COLUMNS]

    def _score_steps(
        self, policy: VLAPolicy, inputs: dict[str, Tensor], trace: Tensor, mask: Tensor, centered: bool = False
    ) -> Tensor:
        """`[S]` score of each decision, forwarded in micro-batches if the configuration says so."""
        size = self.args.step_micro_batch_size or len(trace)
        starts = [*range(0, len(trace), size)]
        idle = most_of_all(self.accelerator, len(starts)) - len(starts)
        parts: list[tuple[Any, ...]] = [
            ({name: value[i : i + size] for name, value in inputs.items()}, trace[i : i + size], mask[i : i + size])
            for i in starts + [0] * idle
        ]
        score: Callable[..., Tensor] = partial(self._score, policy)
        if centered:
            # outside of the checkpoint, whose forward is run twice
            parts = [(*part, self._reference_distribution(*part[:2])) for part in parts]
        if len(parts) == 1:
            return score(*parts[0])
        if torch.is_grad_enabled():
            # Keeps a micro-batch's inputs in place of its activations. Without dropout nothing random is repeated.
            kept = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=not self.args.disable_dropout)
            scores = [kept(*part) for part in parts]
        else:
            scores = [score(*part) for part in parts]
        steps = torch.cat(scores[: len(starts)])
        return steps + 0.0 * torch.cat(scores[len(starts) :]).sum() if idle else steps

    def _score(
        self,
        policy: VLAPolicy,
        inputs: dict[str, Tensor],
        trace: Tensor,
        mask: Tensor,
        ref_logps: Tensor | None = None,
    ) -> Tensor:
        """`[S]`: [`VLAPolicy.score`], or [`centered_scores`] against the reference's distribution."""
        if ref_logps is None:
            return policy.score(inputs, trace, temperature=self.args.temperature, mask=mask)
        logps = policy.action_logps(inputs, trace, temperature=self.args.temperature)
        return centered_scores(logps, ref_logps, trace.to(ref_logps.device), mask.to(ref_logps.device))

    @torch.no_grad()
    def _reference_distribution(self, inputs: dict[str, Tensor], trace: Tensor) -> Tensor:
        """`[S, L, V]` log-probabilities of all action tokens under the reference."""
        if not self._adapter_makes_reference():
            return self._kept_reference.action_logps(inputs, trace, temperature=self.args.temperature)
        with use_adapter(self.accelerator.unwrap_model(self.model), self._reference_adapter()):
            return self.policy.action_logps(inputs, trace, temperature=self.args.temperature)

    def _keep_reference(self) -> None:
        """Keep what [`_reference_distribution`] asks: a frozen policy, where no adapter can be switched off.

        Raises:
            ValueError: if the policy's actions have no distribution that could be averaged over, or its weights are
                divided among processes.
        """
        if not hasattr(self.policy, "action_logps"):
            raise ValueError(
                f"`centered` must be False for a {type(self.policy).__name__}, got True: it samples no tokens."
            )
        if are_divided(self.accelerator):
            raise ValueError(
                "`centered` must be False under ZeRO-3 and FSDP, got True. Use `ddp.yaml` or `zero2.yaml`."
            )
        if not self._adapter_makes_reference():
            self._kept_reference = self.ref_policy or copy.deepcopy(self.policy)
            self._kept_reference.model.to(self.accelerator.device).eval().requires_grad_(False)

    def _score_pairs(
        self, model: nn.Module, policy: VLAPolicy, batch: dict[str, Any], centered: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`[P]` scores of both sides: sum over environment steps, or mean times `C` (half a chunk weighs half a whole one)."""
        inner = self.accelerator.unwrap_model(model)
        given = policy, batch["inputs"], batch["trace"], batch["mask"], centered
        decisions = forward_once(model, inner, self._score_steps, *given).float()
        sides = decisions.new_zeros(2 * len(batch["stages"]))
        scores = sides.index_add(0, batch["side_ids"], decisions)
        if self.args.objective not in SUMMED:
            scores = scores / sides.index_add(0, batch["side_ids"], batch["mask"].to(decisions).mean(dim=1))
        return scores.chunk(2)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`[P]` scores of both sides under the reference."""
        switched_off: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._adapter_makes_reference():
            switched_off = use_adapter(self.accelerator.unwrap_model(self.model), self._reference_adapter())
        with torch.no_grad(), switched_off, self.accelerator.autocast():
            return self._score_pairs(model, self.ref_policy or self.policy, inputs)

    def _adapter_makes_reference(self) -> bool:
        return self.ref_policy is None and is_peft_model(self.model)

    def _reference_adapter(self) -> str | None:
        """The adapter that the model is its own reference with: TRL's frozen copy of one it came with, or none."""
        return "ref" if "ref" in self.model.peft_config else None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add the reference's scores to the rows, from the cache or by the reference as it is now. TRL's own cache
        knows nothing of the objective or the processor."""
        model, is_main = self._reference_model(), self.accelerator.is_main_process
        key = reference_key(
            self.accelerator.unwrap_model(model),
            self.processing_class,
            dataset,
            self.data_collator,
            objective=self.args.objective,
            temperature=self.args.temperature,
            precision=self.accelerator.mixed_precision,
            adapter=str(self._reference_adapter()) if self._adapter_makes_reference() else "as it is",
        )
        folder = cache_folder(dataset, self.args.ref_cache_dir, self.args.output_dir)
        path = folder / f"reference-{key[:32]}.safetensors"
        # the first process's word counts: the others may not see its files
        (scores,) = broadcast_object_list([read_scores(path, len(dataset)) if is_main else None])
        if scores is None:
            scores = self._score_dataset(model, dataset, name, batch_size)
            if is_main:
                write_scores(path, scores)
        for column, values in scores.items():
            dataset = dataset.add_column(column, values.numpy())
        return dataset

    def _reference_model(self) -> nn.Module:
        """What scores the reference. DeepSpeed's weights are in parts before training begins: as in TRL, an engine of
        their own gathers them."""
        if self.ref_model is None and self.is_deepspeed_enabled and self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        return self.ref_model or self._precompute_engine or self.model

    def _score_dataset(self, model: nn.Module, dataset: Dataset, name: str, batch_size: int) -> dict[str, Tensor]:
        """Column -> `[P]` scores of all rows under the reference, on all processes."""
        loader = self.accelerator.prepare_data_loader(
            DataLoader(
                dataset.select_columns([*PAIR_FEATURES]),
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        )
        hidden = self.args.disable_tqdm or not self.accelerator.is_main_process
        was_training = model.training
        model.eval()
        scores = [
            self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            for batch in tqdm(loader, desc=f"Reference scores ({name})", disable=hidden)
        ]
        model.train(was_training)
        columns = zip(REFERENCE_COLUMNS, zip(*scores, strict=True), strict=True)
        return {column: torch.cat(parts).float().cpu() for column, parts in columns}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        # an adapter's own `forward` is not called, which accelerate would have wrapped
        with self.accelerator.autocast():
            chosen, rejected = self._score_pairs(model, self.policy, inputs, self.args.centered)
        weights = (
            None if self.args.stage_weights is None else chosen.new_tensor(self.args.stage_weights)[inputs["stages"]]
        )
        references = [inputs[column] for column in REFERENCE_COLUMNS]
        costs = [inputs["chosen_cost"], inputs["rejected_cost"]]
        losses, logits = stage_preference_loss(
            chosen,
            rejected,
            *references,
            *costs,
            beta=self.args.beta,
            cost_coef=self.args.cost_coef,
            margin_sign=self.args.margin_sign,
            loss_type=self.args.loss_type[0],
            label_smoothing=self.args.label_smoothing,
            weights=weights,
        )
        stages = chosen.new_tensor([self.stage_names.index(name) for name in inputs["stage_names"]])
        gains = [self.args.beta * (score - ref) for score, ref in zip((chosen, rejected), references, strict=True)]
        record = torch.stack([stages, losses, *gains, chosen, rejected, *costs], dim=1).detach()
        mode, gather = "eval", self.accelerator.gather_for_metrics
        if self.model.training:
            # all batches of an update are fetched before the first is scored: each of an epoch's last would be cut as the last one is
            mode, gather = "train", self.accelerator.gather
        self._records[mode].append(gather(record).cpu())
        loss = losses.mean()
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._records[mode]:
            metrics = pair_metrics(torch.cat(self._records[mode]), self.stage_names)
            # of several evaluation sets each has a prefix of its own
            loss = next((name for name in logs if name.endswith("_loss")), "eval_loss") if mode == "eval" else "loss"
            logs.update({loss.removesuffix("loss") + name: value for name, value in metrics.items()})
            self._records[mode].clear()
        super().log(logs, start_time)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` to the output folder: TRL's own is about text generation."""
        if not self.is_world_process_zero():
            return
        more = [tags] if isinstance(tags, str) else tags or []
        write_preference_card(
            self.args,
            self.train_dataset,
            name=self.hub_model_id or model_name or Path(self.args.output_dir).name,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            is_adapter=is_peft_model(self.model),
            tags=(*self._tag_names, *more),
            dataset_name=dataset_name,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_peft_model(self.model) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if is_peft_model(self.model) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            restore_weights(self.model, self.state.best_model_checkpoint)


def _require_pairs(name: str, dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise ValueError(f"`{name}_dataset` must be a Dataset, got {type(dataset).__name__}. Use `pairs_dataset`.")
    if len(dataset) == 0:
        raise ValueError(
            f"`{name}_dataset` must hold a pair, got none. Play more starts or episodes a start, and see the pairs' yield."
        )
