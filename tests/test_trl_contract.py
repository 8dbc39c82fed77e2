"""Every attribute of TRL and transformers that the trainers lean on. A failure here says what an upgrade would
break."""

import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest  # noqa: E402
from transformers import PreTrainedModel, Trainer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

from trl_stare.trainers._compat import _BaseConfig, _BaseTrainer  # noqa: E402
from trl_stare.trainers.stage_dpo_config import StageDPOConfig  # noqa: E402
from trl_stare.trainers.stage_dpo_trainer import StageDPOTrainer  # noqa: E402

# owner, method, parameters we pass or receive, what breaks without
METHODS = [
    (
        DPOTrainer,
        "_prepare_dataset",
        ["dataset", "processing_class", "args", "dataset_name"],
        "rows would be read as texts",
    ),
    (DPOTrainer, "_set_signature_columns_if_needed", [], "the columns of stage pairs would be removed"),
    (
        DPOTrainer,
        "_precompute_ref_logps",
        ["dataset", "name", "batch_size"],
        "TRL's cached reference scores would be used",
    ),
    (DPOTrainer, "compute_ref_log_probs", ["model", "inputs"], "reference scores would be those of texts"),
    (
        DPOTrainer,
        "compute_loss",
        ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "the loss would be TRL's",
    ),
    (DPOTrainer, "log", ["logs", "start_time"], "stage metrics would not be logged"),
    (
        DPOTrainer,
        "prediction_step",
        ["model", "inputs", "prediction_loss_only"],
        "evaluation would not call compute_loss",
    ),
    (_BaseTrainer, "create_model_card", ["model_name", "dataset_name", "tags"], "checkpoints would have no card"),
    (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"], "resuming might silently restore nothing"),
    (Trainer, "_load_best_model", [], "the best model might silently not be loaded"),
    (Trainer, "_prepare_inputs", ["inputs"], "batches would not reach the device"),
    (Trainer, "get_train_dataloader", [], "StagePPOTrainer's rollouts would not be iterated"),
    (Trainer, "create_optimizer", [], "the value head would have no learning rate of its own"),
    (Trainer, "training_step", ["model", "inputs"], "the loop would not be HF's"),
    (Trainer, "save_model", ["output_dir"], "checkpoints would lack the processor or the value head"),
    (Trainer, "_save_checkpoint", ["model", "trial"], "checkpoints would not be written beside and then renamed"),
    (Trainer, "_get_output_dir", ["trial"], "checkpoints would be written in place, file by file"),
    (
        Trainer,
        "get_batch_samples",
        ["epoch_iterator", "num_batches"],
        "an iteration without batches might not end a run",
    ),
    (
        Trainer,
        "evaluate",
        ["eval_dataset", "ignore_keys", "metric_key_prefix"],
        "evaluation by episodes would not be called",
    ),
    (
        PreTrainedModel,
        "from_pretrained",
        ["pretrained_model_name_or_path"],
        "`restore_weights` could not read checkpoints",
    ),
    (utils, "use_adapter", ["model", "adapter_name"], "LoRA would have no reference"),
]

# what DPOTrainer's constructor or loop must do by itself, as words of its source
SOURCES = [
    (DPOTrainer.__init__, "self._prepare_dataset(", "rows would not be checked"),
    (DPOTrainer.__init__, "self._precompute_ref_logps(", "there would be no reference scores"),
    (DPOTrainer.__init__, '"images" in dataset_sample', "our columns avoid the names image and images for no reason"),
    (DPOTrainer.__init__, "self._precompute_engine = None", "DeepSpeed's reference would have no engine"),
    (DPOTrainer.__init__, "add_fused_lm_head(", "`keep_forward` would guard against nothing: remove it"),
    (DPOTrainer.__init__, "args.precompute_ref_log_probs", "a second model might be loaded as reference"),
    (DPOTrainer._save_checkpoint, "create_model_card", "checkpoints would have no card"),
    (Trainer._save_checkpoint, "self._get_output_dir(", "checkpoints would be written in place, file by file"),
    (Trainer._save_checkpoint, "self.state.save_to_json(", "checkpoints would lack the trainer's state"),
    (Trainer._inner_training_loop, "self._run_epoch(", "a finished run, given again, would go one step further"),
    (Trainer._run_epoch, "on_pre_optimizer_step", "updates that are not finite would not be skipped"),
    (Trainer._run_epoch, "if step < 0:", "a run stopped within a rollout would go on"),
    (PreTrainedModel.from_pretrained, "output_loading_info", "`restore_weights` could not see missing keys"),
]


def short(value: object) -> str:
    """A test's name, the same in every process."""
    return getattr(value, "__qualname__", getattr(value, "__name__", str(value)))[:40]


@pytest.mark.parametrize(("owner", "name", "parameters", "breaks"), METHODS, ids=short)
def test_method(owner, name, parameters, breaks):
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone: {breaks}."
    found = [*inspect.signature(method).parameters]
    missing = [parameter for parameter in parameters if parameter not in found]
    assert not missing, f"{owner.__name__}.{name} has lost {missing} (it has {found}): {breaks}."


@pytest.mark.parametrize(("function", "words", "breaks"), SOURCES, ids=short)
def test_source(function, words, breaks):
    assert words in inspect.getsource(function), f"{function.__qualname__} no longer has {words!r}: {breaks}."


def test_constructor_arguments():
    needed = {
        "model",
        "ref_model",
        "args",
        "data_collator",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "callbacks",
        "optimizers",
        "peft_config",
    }
    missing = needed - set(inspect.signature(DPOTrainer.__init__).parameters)
    assert not missing, f"DPOTrainer no longer takes {missing}: StageDPOTrainer cannot be made."


def test_inheritance():
    assert issubclass(DPOTrainer, _BaseTrainer), "`_BaseTrainer` is no longer the root of TRL's trainers."
    assert issubclass(_BaseTrainer, Trainer), "`_BaseTrainer` is no longer an HF Trainer."
    assert issubclass(DPOConfig, _BaseConfig), "`_BaseConfig` is no longer the root of TRL's configurations."
    assert issubclass(StageDPOTrainer, DPOTrainer)
    assert issubclass(StageDPOConfig, DPOConfig)


def test_the_loss_is_averaged_over_accumulation_by_the_loop():
    assert DPOTrainer.loss_is_scaled_for_ga is False, "the mean over a batch would be summed over accumulation steps."


def test_every_override_still_overrides():
    """A method renamed upstream would leave ours behind, never called."""
    ours = [name for name, value in vars(StageDPOTrainer).items() if inspect.isfunction(value)]
    own = {"_score", "_score_steps", "_score_pairs", "_score_dataset", "_reference_distribution", "_keep_reference"}
    own |= {"_reference_model", "_reference_adapter", "_adapter_makes_reference"}
    orphans = [name for name in ours if name not in own and not hasattr(DPOTrainer, name)]
    assert not orphans, f"{orphans} of StageDPOTrainer override nothing in DPOTrainer any more."


def test_every_new_option_has_help():
    new = [
        field
        for name, field in StageDPOConfig.__dataclass_fields__.items()
        if name not in DPOConfig.__dataclass_fields__
    ]
    assert {field.name for field in new} == {
        "objective",
        "cost_coef",
        "margin_sign",
        "stage_weights",
        "step_micro_batch_size",
        "ref_cache_dir",
        "centered",
        "temperature",
    }
    assert all(field.metadata.get("help") for field in new)
