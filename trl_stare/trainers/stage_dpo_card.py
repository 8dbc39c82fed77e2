"""The model card of a preference training: what was trained on what, in place of TRL's card about text generation."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData

from trl_stare.data.cards import card_template, loading_code
from trl_stare.trainers.stage_dpo_config import StageDPOConfig

METHODS = {
    "sta-tpo": "StA-TPO, which compares them stage by stage",
    "sta-tpo-sum": "StA-TPO, which compares them stage by stage, by the sum over steps",
    "tpo-mean": "TPO, which compares them whole, by the mean over steps",
    "tpo-sum": "TPO, which compares them whole, by the sum over steps",
}
SETTINGS = (
    *("objective", "loss_type", "beta", "cost_coef", "margin_sign", "learning_rate", "lr_scheduler_type"),
    *("temperature", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed"),
)
TAGS = ("robotics", "vision-language-action")


def write_preference_card(
    config: StageDPOConfig,
    rows: Dataset,
    *,
    name: str,
    step: int,
    max_steps: int,
    is_adapter: bool,
    tags: tuple[str, ...],
    dataset_name: str | None = None,
) -> Path:
    """Write `README.md` to the output folder.

    Args:
        config ([`StageDPOConfig`]): the training's.
        rows (`Dataset`): what was trained on.
        name (`str`): the model's name; a Hub id where there is one.
        step (`int`), max_steps (`int`): how far training is.
        is_adapter (`bool`): whether the folder holds PEFT's adapter only.
        tags (`tuple[str, ...]`): of the model, beside [`TAGS`].
        dataset_name (`str`, *optional*): the dataset's Hub id.

    Returns:
        the file.
    """
    counts = Counter(zip(rows["stage"], rows["stage_name"], strict=True))
    settings = {setting: getattr(config, setting) for setting in SETTINGS}
    card = ModelCard.from_template(
        ModelCardData(
            library_name="peft" if is_adapter else "transformers",
            pipeline_tag="robotics",
            tags=sorted({*tags, *TAGS}),
            datasets=dataset_name,
        ),
        template_str=card_template("preference_card.md"),
        name=name.split("/")[-1],
        tasks=sorted(set(rows["task"])),
        method=METHODS[config.objective],
        usage=loading_code(name, is_adapter=is_adapter),
        num_pairs=len(rows),
        stages={stage: count for (_, stage), count in sorted(counts.items())},
        step=step,
        max_steps=max_steps,
        settings={key: getattr(value, "value", value) for key, value in settings.items()},
        versions={package: version(package) for package in ("trl-stare", "trl", "transformers", "torch")},
    )
    file = Path(config.output_dir) / "README.md"
    card.save(file)
    return file
