"""`eval_info.json`: what an evaluation measured and all that decided it, with LeRobot's field names. No times, no dates."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from trl_stare.evaluation.played import PlayedEpisode, counted
from trl_stare.evaluation.records import EpisodeResult
from trl_stare.evaluation.report import compact_json, format_seeds, markdown_table, package_versions
from trl_stare.evaluation.statistics import Proportion, format_rate
from trl_stare.files import write_atomically
from trl_stare.interfaces import NOMINAL
from trl_stare.stages import stage_success

RULES = ("success_once", "success_at_end")
"""When an episode counts as solved: at any step, or at the last one, which is always the time limit's."""
COUNTED = ("n_episodes", "n_success", "pc_success", "pc_success_ci95")
"""What LeRobot writes of a task beside its `metrics`."""


def task_metrics(
    episodes: Sequence[PlayedEpisode],
    stage_events: Mapping[str, str],
    *,
    rule: str,
    environment: Mapping[str, Any],
    videos: Sequence[str] = (),
) -> dict[str, Any]:
    """What is said of one task.

    Args:
        episodes (`Sequence[PlayedEpisode]`): its rows; void ones are counted apart.
        stage_events (`Mapping[str, str]`): [`~trl_stare.stages.StagePlan.event_names`] of its plan.
        rule (`str`): one of `RULES`, what `n_success` counts.
        environment (`Mapping`): what the environment says about itself.
        videos (`Sequence[str]`): relative to the evaluation's folder.

    Returns:
        `dict`: see [`rates`], and `n_voided`, `eval_seeds` (evaluation seed -> its episodes' seeds, as text), `stages` (name ->
        `reached`, `passed`, `rate`, `ci95`: P(stage | the one before)), `stage_events`, `environment`, `video_paths`.

    Raises:
        ValueError: if no episode counts, or `rule` is unknown.
    """
    results = counted(episodes)
    counts = stage_success([result.segments for result in results], len(stage_events))
    by_seed: dict[int, list[int]] = {}
    for episode in episodes:
        by_seed.setdefault(episode.eval_seed, []).append(episode.result.seed)
    return {
        **rates(results, rule),
        "n_voided": len(episodes) - len(results),
        "eval_seeds": {str(seed): format_seeds(starts) for seed, starts in by_seed.items()},
        "stages": {name: _stage(*count) for name, count in zip(stage_events, counts, strict=True)},
        "stage_events": dict(stage_events),
        "environment": dict(environment),
        "video_paths": list(videos),
    }


def rates(results: Sequence[EpisodeResult], rule: str) -> dict[str, Any]:
    """Success of some episodes.

    Returns:
        `dict`: `n_episodes`, `n_success`, `pc_success` and `pc_success_ci95` (percent, Wilson) by `rule`, and both rules by
        name: `success_once`, `success_once_ci95`, `success_at_end`, `success_at_end_ci95` in [0, 1].

    Example: one success among four: `n_success` 1, `pc_success` 25.0, `pc_success_ci95` `[4.56, 69.94]`.
    """
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {', '.join(RULES)}, got {rule!r}.")
    if not results:
        raise ValueError("`episodes` must hold at least one episode that is not void, got none.")
    by_rule = {name: Proportion.of([getattr(result, name) for result in results]) for name in RULES}
    used = by_rule[rule]
    found: dict[str, Any] = {
        "n_episodes": used.n,
        "n_success": used.k,
        "pc_success": 100 * used.rate,
        "pc_success_ci95": [100 * end for end in used.wilson()],
    }
    for name, proportion in by_rule.items():
        found |= {name: proportion.rate, f"{name}_ci95": list(proportion.wilson())}
    return found


def build_eval_info(
    *,
    policy: Mapping[str, Any],
    settings: Mapping[str, Any],
    group: str,
    episodes: Mapping[str, Sequence[PlayedEpisode]],
    metrics: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `eval_info.json`.

    Args:
        policy (`Mapping`): [`PolicySource.to_dict`].
        settings (`Mapping`): `success_rule`, `temperature` and whatever else the episodes depend on.
        group (`str`): name of the suite.
        episodes (`Mapping`): task -> its rows.
        metrics (`Mapping`): task -> what [`task_metrics`] says of it.

    Returns:
        `dict`: `per_task`, `per_group` and `overall` as LeRobot writes them (https://github.com/huggingface/lerobot/pull/4628), and
        `policy`, `settings`, `versions`. A group counts its episodes together; `pc_success_task_mean` is the mean of its tasks' rates, what SimplerEnv's tables call average.
    """
    everything = [result for rows in episodes.values() for result in counted(rows)]
    overall = rates(everything, settings["success_rule"])
    overall["pc_success_task_mean"] = sum(task["pc_success"] for task in metrics.values()) / len(metrics)
    overall["n_voided"] = sum(task["n_voided"] for task in metrics.values())
    overall["video_paths"] = [path for task in metrics.values() for path in task["video_paths"]]
    return {
        "policy": dict(policy),
        "settings": dict(settings),
        "versions": package_versions(),
        "per_task": [
            {"task_group": group, "task_id": index, "task": name}
            | {field: task[field] for field in COUNTED}
            | {"metrics": dict(task)}
            for index, (name, task) in enumerate(metrics.items())
        ],
        "per_group": {group: overall},
        "overall": overall,
    }


def write_eval_info(folder: str | os.PathLike, info: Mapping[str, Any]) -> None:
    """Write `eval_info.json` and the table `eval_info.md` into `folder`, each all or nothing."""
    write_atomically(Path(folder) / "eval_info.json", compact_json(info) + "\n")
    write_atomically(Path(folder) / "eval_info.md", eval_table(info) + "\n")


def read_eval_info(folder: str | os.PathLike) -> dict[str, Any]:
    """What [`write_eval_info`] wrote into `folder`.

    Raises:
        FileNotFoundError: if `folder` holds no finished evaluation.
    """
    file = Path(folder) / "eval_info.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"`{folder}` must hold eval_info.json, got none. Run recipes/evaluate.py to its end first."
        )
    return json.loads(file.read_text(encoding="utf-8"))


def eval_table(info: Mapping[str, Any]) -> str:
    """Success and stages as Markdown."""
    rows = []
    for task in info["per_task"]:
        found = task["metrics"]
        rows.append((task["task"], found["n_episodes"], *(format_rate(found[r], found[f"{r}_ci95"]) for r in RULES)))
    overall = info["overall"]
    if len(rows) > 1:
        rows.append(
            ("all together", overall["n_episodes"], *(format_rate(overall[r], overall[f"{r}_ci95"]) for r in RULES))
        )
        rows.append(("mean of the tasks' rates", len(rows) - 1, f"{overall['pc_success_task_mean']:.1f} %", ""))
    success = markdown_table(("task", "n", "success once", "success at end"), rows)
    stages = [
        (task["task"], name, stage["reached"], stage["passed"], _format_stage(stage))
        for task in info["per_task"]
        for name, stage in task["metrics"]["stages"].items()
    ]
    funnel = markdown_table(("task", "stage", "reached", "passed", "P(stage given the one before)"), stages)
    used = info["settings"]
    note = f"In brackets: Wilson 95 % intervals. Success rule: {used['success_rule']}"
    # a demonstrator and random actions have none
    note += "." if used["temperature"] is None else f"; temperature {used['temperature']}."
    variations = {task["metrics"]["environment"].get("variation", NOMINAL) for task in info["per_task"]}
    if variations != {NOMINAL}:
        note += f" Variation: {', '.join(sorted(variations))}."
    return f"{success}\n\n{funnel}\n\n{note}"


def eval_results(info: Mapping[str, Any]) -> list[EvalResult]:
    """One `EvalResult` per task and rule, for the metadata of a model card: rates in [0, 1], interval and n in the name."""
    results = []
    for task in info["per_task"]:
        found = task["metrics"]
        for rule in RULES:
            interval = format_rate(found[rule], found[f"{rule}_ci95"])
            results.append(
                EvalResult(
                    task_type="robotics",
                    task_name="Robotics",
                    dataset_type=task["task"],
                    dataset_name=task["task"],
                    metric_type=rule,
                    metric_name=f"{rule}, n = {found['n_episodes']}, {interval}",
                    metric_value=round(found[rule], 4),
                )
            )
    return results


def _stage(passed: int, reached: int) -> dict[str, Any]:
    share = Proportion(passed, reached) if reached else None
    return {
        "reached": reached,
        "passed": passed,
        "rate": share.rate if share else None,
        "ci95": list(share.wilson()) if share else None,
    }


def _format_stage(stage: Mapping[str, Any]) -> str:
    return "not reached" if stage["rate"] is None else format_rate(stage["rate"], stage["ci95"])
