"""`results.json` and its table: rates with intervals, paired tests, environment steps, where episodes are lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter, methodcaller
from typing import Any

from benchmarks.evidence.curves import learning_curve, moving_success, steps_to_reach
from benchmarks.evidence.queue import Arm, Queue
from benchmarks.evidence.runs import Step
from trl_stare import StagePlan
from trl_stare.evaluation import (
    EpisodeResult,
    Proportion,
    format_rate,
    mcnemar_exact,
    mean_difference,
    package_versions,
    paired,
    paired_difference,
)
from trl_stare.evaluation.report import markdown_table
from trl_stare.stages import stage_success

Episodes = Mapping[int, Sequence[EpisodeResult]]
"""Training seed -> evaluation."""

logger = logging.getLogger("evidence")

SOLVED = attrgetter("success_once")


def summarise(episodes: Episodes, plan: StagePlan) -> dict[str, Any]:
    """One row of the table: the evaluations of all training seeds together, and each by itself.

    Returns:
        `n_episodes`, `success_once` and `success_at_end` with Wilson 95 % intervals, `success_once_per_seed`; of each stage `stage_counts`
        (passed, reached), `stage_success` (P(stage | previous stage)) and `lost`, the share of all episodes that reached it and
        did not pass it; the stage `loses_most_in`, `None` where all episodes succeed.
    """
    pooled = [episode for seed in episodes for episode in episodes[seed]]
    row: dict[str, Any] = {"n_episodes": len(pooled)}
    for rule in ("success_once", "success_at_end"):
        rate = Proportion.of([getattr(episode, rule) for episode in pooled])
        row |= {rule: rate.rate, f"{rule}_ci95": list(rate.wilson())}
    row["success_once_per_seed"] = {
        seed: Proportion.of([episode.success_once for episode in episodes[seed]]).rate for seed in episodes
    }
    counts = dict(zip(plan.names, stage_success([e.segments for e in pooled], len(plan)), strict=True))
    row["stage_counts"] = {stage: list(count) for stage, count in counts.items()}
    row["stage_success"] = {stage: p / reached if reached else None for stage, (p, reached) in counts.items()}
    row["lost"] = {stage: (reached - p) / len(pooled) for stage, (p, reached) in counts.items()}
    worst = max(row["lost"], key=row["lost"].get)
    return row | {"loses_most_in": worst if row["lost"][worst] else None}


def compare(a: Episodes, b: Episodes, stages: Sequence[str]) -> dict[str, Any]:
    """`b` against `a` on the same held-out seeds: pooled over the training seeds both have, and for each of them; `per_stage` compares
    who passed a stage in the same way, of all episodes, since only what both played can be paired.

    The exact test counts each pair of episodes as independent, which those of one training run are not: two runs of one arm may differ
    by more than it allows. `over_seeds` is the interval of the mean of the training seeds' differences, `None` for a single one.
    """
    per_stage = {stage: _over_seeds(a, b, methodcaller("passed", k)) for k, stage in enumerate(stages)}
    return _over_seeds(a, b, SOLVED) | {"per_stage": per_stage}


def _over_seeds(a: Episodes, b: Episodes, outcome: Callable[[EpisodeResult], bool]) -> dict[str, Any]:
    common = [seed for seed in a if seed in b]
    per_seed = {seed: _test(a, b, [seed], outcome) for seed in common}
    differences = [test["difference"] for test in per_seed.values()]
    interval = list(mean_difference(differences)[1:]) if len(common) > 1 else None
    return _test(a, b, common, outcome) | {"per_seed": per_seed, "over_seeds": interval}


def _test(a: Episodes, b: Episodes, seeds: Sequence[int], outcome: Callable[[EpisodeResult], bool]) -> dict[str, Any]:
    pairs = [paired(a[seed], b[seed], outcome) for seed in seeds]
    first, second = ([x for pair in pairs for x in pair[i]] for i in (0, 1))
    value, low, high = paired_difference(first, second)
    test = mcnemar_exact(first, second)
    return {"n": len(first), "difference": value, "difference_ci95": [low, high], **test._asdict()}


def level_name(level: float) -> str:
    """What a level of success is called in the results: 0.5 is `"50%"`, 0.005 `"0.5%"`."""
    return f"{100 * level:g}%"


def learning(queue: Queue, steps: Mapping[int, Sequence[Step]], first_stage: str) -> dict[str, Any]:
    """Training seed -> environment steps to train and to reach each level, and the curve; all empty for `sft`."""
    found: dict[str, Any] = {"env_steps": {}, "curves": {}, "reach": {level_name(level): {} for level in queue.levels}}
    for seed, done in steps.items():
        found["env_steps"][seed] = sum(step.env_steps for step in done)
        if not done or done[-1].ledger is None:
            continue
        before = sum(step.env_steps for step in done[:-1])
        curve = learning_curve(done[-1].ledger, first_stage, steps_before=before)
        found["curves"][seed] = moving_success(curve, queue.window)
        for level in queue.levels:
            found["reach"][level_name(level)][seed] = steps_to_reach(curve, level, queue.window)
    return found


def build_results(
    queue: Queue,
    plan: StagePlan,
    starts: Mapping[str, Episodes],
    arms: Mapping[str, tuple[Mapping[int, Sequence[Step]], Episodes]],
    checkpoints: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        queue ([`Queue`]): what was to be run. plan ([`StagePlan`]): of its task.
        starts (`Mapping`): name of a checkpoint -> its evaluations, one with the sampling seed of each training seed.
        arms (`Mapping`): name of an arm -> its finished steps and its evaluations, by training seed.
        checkpoints (`Mapping`): name of a checkpoint -> what tells it from others.
    """
    by_name: dict[str, Arm] = {arm.name: arm for arm in queue.arms}
    rows, tests = {}, []
    for name, (steps, episodes) in arms.items():
        arm = by_name[name]
        rows[name] = {"method": arm.method, "start": arm.start} | summarise(episodes, plan)
        rows[name] |= learning(queue, steps, plan.names[0])
        rows[name]["missing_seeds"] = [seed for seed in arm.seeds if seed not in episodes]
        if arm.method != "sft":
            tests += _tested(arm.start, name, starts[arm.start], episodes, plan)
    for a, b in queue.compare:
        if a in arms and b in arms and arms[a][1].keys() & arms[b][1].keys():
            tests += _tested(a, b, arms[a][1], arms[b][1], plan)
    return {
        "queue": asdict(queue),
        "checkpoints": checkpoints,
        "versions": package_versions(),
        "stages": list(plan.names),
        "starts": {name: summarise(episodes, plan) for name, episodes in starts.items()},
        "arms": rows,
        "comparisons": tests,
    }


def _tested(a: str, b: str, of_a: Episodes, of_b: Episodes, plan: StagePlan) -> list[dict[str, Any]]:
    """One comparison, or none where too many episodes are void: the queue goes on, and the table has the rates."""
    try:
        return [{"a": a, "b": b} | compare(of_a, of_b, plan.names)]
    except ValueError as error:
        logger.error("%s -> %s is not compared: %s", a, b, error)
        return []


def markdown(results: Mapping[str, Any]) -> str:
    """The tables a reader sees."""
    queue, rows = results["queue"], results["starts"] | results["arms"]
    levels = [level_name(level) for level in queue["levels"]]
    parts = [
        f"# {queue['task']}",
        f"Each checkpoint on the held-out seeds 0 to {queue['eval_episodes'] - 1}, sampled at temperature {queue['temperature']:g}; "
        "success at any step, Wilson 95 % intervals over the episodes of all training seeds. Environment steps to a level of success: "
        f"over the last {queue['window']} rollouts, one value a training seed, - where it was not reached.",
        markdown_table(
            (
                "",
                "n",
                "success",
                "per training seed, %",
                *(f"to {level.replace('%', ' %')}, 1000 steps" for level in levels),
                "1000 steps in all",
            ),
            [_success_cells(name, row, levels) for name, row in rows.items()],
        ),
        "Of all episodes, how many passed each stage:",
        markdown_table(
            ("", *results["stages"], "loses most in"),
            [
                (name, *(row["stage_counts"][stage][0] for stage in results["stages"]), _worst(row))
                for name, row in rows.items()
            ],
        ),
        "Paired on the same seeds, differences in points with 95 % intervals, p of the exact McNemar test, which knows nothing of how "
        "much training varies; behind the training seeds' differences, and of the stages behind the word seeds, the interval of their mean "
        "(Student's t), which does:",
        markdown_table(
            ("", "n", "success", "of each training seed", "only the second, only the first", "p", *results["stages"]),
            [_test_cells(test) for test in results["comparisons"]],
        ),
    ]
    missing = {name: row["missing_seeds"] for name, row in results["arms"].items() if row["missing_seeds"]}
    if missing:
        parts.append("Not finished: " + "; ".join(f"{name}, seeds {seeds}" for name, seeds in missing.items()) + ".")
    return "\n\n".join(parts) + "\n"


def _success_cells(name: str, row: Mapping[str, Any], levels: Sequence[str]) -> tuple[Any, ...]:
    reach = row.get("reach", {})
    return (
        name,
        row["n_episodes"],
        format_rate(row["success_once"], row["success_once_ci95"]),
        ", ".join(f"{100 * rate:.1f}" for rate in row["success_once_per_seed"].values()),
        *(_thousands(reach.get(level, {}).values()) for level in levels),
        _thousands(row.get("env_steps", {}).values()),
    )


def _test_cells(test: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        f"{test['a']} -> {test['b']}",
        test["n"],
        _points(test),
        ", ".join(f"{100 * part['difference']:+.1f}" for part in test["per_seed"].values())
        + _interval(test["over_seeds"]),
        f"{test['b_only']}, {test['a_only']}",
        f"{test['p_value']:.2g}",
        *(_stage_cell(part) for part in test["per_stage"].values()),
    )


def _stage_cell(test: Mapping[str, Any]) -> str:
    seeds = f"; seeds{_interval(test['over_seeds'])}" if test["over_seeds"] else ""
    return f"{_points(test)}, p = {test['p_value']:.2g}{seeds}"


def _points(test: Mapping[str, Any]) -> str:
    return f"{100 * test['difference']:+.1f}{_interval(test['difference_ci95'])}"


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else " [{:+.1f}, {:+.1f}]".format(*(100 * end for end in ends))


def _thousands(values: Any) -> str:
    return ", ".join("-" if value is None else f"{value / 1000:.0f}" for value in values) or "-"


def _worst(row: Mapping[str, Any]) -> str:
    stage = row["loses_most_in"]
    return "-" if stage is None else f"{stage} ({100 * row['lost'][stage]:.0f} % of episodes)"
