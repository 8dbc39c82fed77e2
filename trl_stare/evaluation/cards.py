"""Model cards: what a checkpoint is and what it was measured to do, in the Hub's own format. Works offline."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from trl_stare.data.cards import card_template, loading_code
from trl_stare.evaluation.phases import phase_turn
from trl_stare.evaluation.records import PhaseResult
from trl_stare.evaluation.report import format_seconds, format_seeds, markdown_table, package_versions, stage_cells
from trl_stare.evaluation.statistics import format_rate

METHODS = {
    "imitation": "imitation of demonstrations (supervised fine-tuning).",
    "preference": "stage-wise preference optimisation (StA-TPO) on pairs of rollouts.",
    "interaction": "stage-aware PPO (StA-PPO) in the simulator.",
}
"""What each phase does, in the card's words. Of which policy is not said here: any phase may start from any checkpoint."""

PLAIN_METHODS = {
    "preference": "preference optimisation (TPO) on pairs of whole rollouts, not stage by stage.",
    "interaction": "PPO in the simulator, its rewards not shaped by stages.",
}
"""In the place of those sentences, for baselines that know no stages."""

RESULTS = ("<!-- results of recipes/evaluate.py -->", "<!-- end of results -->")
"""What stands around the table that [`publish_results`] writes into a card."""

TAGS = ("robotics", "reinforcement-learning", "vision-language-action", "trl", "stare")


def write_model_card(
    folder: str | os.PathLike,
    *,
    phase: str,
    result: PhaseResult | Mapping[str, Any],
    task: str,
    usage: str | None = None,
    visuals: str | None = None,
    started_from: str | None = None,
    method: str | None = None,
    model_name: str | None = None,
    license: str = "apache-2.0",
    versions: Mapping[str, str | None] | None = None,
) -> Path:
    """Write `README.md` into the folder of a checkpoint.

    Args:
        folder (`str`): the checkpoint's folder; must exist.
        phase (`str`): one of `PHASES`, or a later round like `preference-2`.
        result (`PhaseResult` or `Mapping`): its evaluation, or that phase of `results.json`.
        task (`str`): its registered name.
        usage (`str`, *optional*): Python lines that load the checkpoint, if not [`~trl_stare.data.cards.loading_code`].
        visuals (`str`, *optional*): of the episodes. started_from (`str`, *optional*): the checkpoint that the phase began from.
        method (`str`, *optional*): what was done, in a sentence, e.g. of a baseline; [`METHODS`] by default.
        model_name (`str`, *optional*): `"{task}-{phase}"` by default.
        license (`str`): identifier as the Hub lists it.
        versions (`Mapping`, *optional*): of packages; [`package_versions`] by default.

    Returns:
        the path of the card.

    Raises:
        ValueError: for an unknown phase.
        FileNotFoundError: if `folder` does not exist.
    """
    kind, _ = phase_turn(phase)
    folder = _check_checkpoint(folder)
    usage = usage or loading_code("path/to/this/folder", is_adapter=(folder / "adapter_config.json").exists())
    evaluation = result.to_dict() if isinstance(result, PhaseResult) else result
    model_name = model_name or f"{task}-{phase}"
    card = ModelCard.from_template(
        _card_data(model_name, task, evaluation, license),
        template_str=card_template("model_card.md"),
        model_name=model_name,
        task=task,
        phase=phase,
        method=method or METHODS[kind],
        usage=usage.strip(),
        visuals=visuals,
        started_from=started_from,
        **{name: evaluation[name] for name in ("n_episodes", "temperature", "max_episode_steps", "env_steps")},
        wall_s=None if evaluation["wall_s"] is None else format_seconds(evaluation["wall_s"]),
        success_table=_success_table(evaluation),
        stage_table=markdown_table(("stage", "success"), stage_cells(evaluation).items()),
        seeds=format_seeds(evaluation["eval_seeds"]),
        versions=versions or package_versions(),
    )
    path = folder / "README.md"
    card.save(path)
    return path


def _check_checkpoint(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`folder` must be the folder of a checkpoint, got {str(folder)!r}. Save the model first."
        )
    return folder


def _card_data(model_name: str, task: str, evaluation: Mapping[str, Any], license: str) -> ModelCardData:
    """The metadata, with both success rules in its model-index."""
    eval_results = [
        EvalResult(
            task_type="robotics",
            task_name="Robotics",
            dataset_type=task,
            dataset_name=task,
            metric_type=rule,
            metric_name=f"{rule}, n = {evaluation['n_episodes']}, {format_rate(evaluation[rule], evaluation[f'{rule}_ci95'])}",
            metric_value=round(evaluation[rule], 4),
        )
        for rule in ("success_once", "success_at_end")
    ]
    return ModelCardData(
        model_name=model_name,
        library_name="transformers",
        pipeline_tag="robotics",
        license=license,
        tags=list(TAGS),
        eval_results=eval_results,
    )


def _success_table(evaluation: Mapping[str, Any]) -> str:
    rows = [
        (rule.replace("_", " "), evaluation["n_episodes"], format_rate(evaluation[rule], evaluation[f"{rule}_ci95"]))
        for rule in ("success_once", "success_at_end")
    ]
    return markdown_table(("", "n", "rate"), rows)


def publish_results(model: str, results: Sequence[EvalResult], *, token: str | None = None) -> str:
    """Put results into the metadata of a model's card and into a table at its end; those of the same task and metric are replaced,
    all else stays.

    Args:
        model (`str`): a checkpoint's folder, whose `README.md` is changed, or a Hub id, whose card is pushed.
        results (`Sequence[EvalResult]`): of one evaluation.
        token (`str`, *optional*): by default the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        where the card is: a path or an address.
    """
    folder = Path(model) if Path(model).is_dir() else None
    name = (folder.resolve() if folder else Path(model)).name
    try:
        card = ModelCard((folder / "README.md").read_text("utf-8")) if folder else ModelCard.load(model, token=token)
    except (EntryNotFoundError, FileNotFoundError):
        card = ModelCard(f"---\nlibrary_name: transformers\npipeline_tag: robotics\n---\n\n# {name}\n")
    replaced = {(result.dataset_type, result.metric_type) for result in results}
    kept = [old for old in card.data.eval_results or [] if (old.dataset_type, old.metric_type) not in replaced]
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = [*kept, *results]
    card.text = _with_results(card.text, card.data.eval_results)
    if folder:
        card.save(folder / "README.md")
        return str(folder / "README.md")
    return str(card.push_to_hub(model, token=token, commit_message="Evaluation results by trl-stare"))


def _with_results(text: str, results: Sequence[EvalResult]) -> str:
    """The card's text, whose last section, written anew each time, says what the metadata do."""
    begin, end = RESULTS
    rows = [(each.dataset_name, each.metric_name or f"{each.metric_type} {each.metric_value}") for each in results]
    table = markdown_table(("task", "result"), rows)
    what = "As the metadata say; an evaluation above is of the training run that made the checkpoint."
    section = f"{begin}\n## Results of `recipes/evaluate.py`\n\n{what}\n\n{table}\n{end}\n"
    without = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}\n?", "", text, flags=re.DOTALL)
    return f"{without.rstrip()}\n\n{section}"
