"""`results.json`, and `report.md` with its picture: what a run measured, and what the differences are worth."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trl_stare.evaluation.phases import PHASES, phase_order
from trl_stare.evaluation.plots import History, plot_report, run_title
from trl_stare.evaluation.records import EpisodeResult, PhaseResult, paired
from trl_stare.evaluation.statistics import format_rate, mcnemar_exact
from trl_stare.files import write_atomically

PACKAGES = (
    "trl_stare",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "torch",
    "mani_skill",
    "sapien",
    "numpy",
)
"""What decides a result, and so is recorded with it."""

RESULT_FIELDS = ("task", "seed", "versions", "visuals", "phases")
"""What `results.json` holds at its top."""

PHASE_FIELDS = (
    "checkpoint",
    "n_episodes",
    "success_once",
    "success_once_ci95",
    "success_at_end",
    "success_at_end_ci95",
    "stage_success",
    "eval_seeds",
    "env_steps",
    "wall_s",
    "temperature",
    "max_episode_steps",
    "stage_counts",
)
"""What it holds for every phase, at least."""


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of `PACKAGES`; `None` for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def build_results(
    *, task: str, seed: int, visuals: str, phases: Mapping[str, PhaseResult | Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of `results.json`. A phase may come as [`PhaseResult`], or as read from an earlier `results.json`."""
    ordered = {name: phases[name] for name in sorted(phases, key=phase_order)}
    return {
        "task": task,
        "seed": seed,
        "versions": package_versions(),
        "visuals": visuals,
        "phases": {
            name: phase.to_dict() if isinstance(phase, PhaseResult) else dict(phase) for name, phase in ordered.items()
        },
    }


def write_results(path: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write `results.json`, all of it or nothing, so that it may be rewritten after every phase.

    Raises:
        ValueError: if a field of the schema is missing, or a phase is not one of `PHASES` or a later round.
    """
    _check(results)
    write_atomically(path, compact_json(results) + "\n")


def compact_json(value: Any) -> str:
    """Indented JSON with lists of numbers (hundreds of seeds) on one line each. NaN is refused."""
    text = json.dumps(value, indent=2, allow_nan=False)
    return re.sub(r"\[\n([-+.\deE,\s]+)\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """The inverse of [`write_results`]."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_report(
    output_dir: str | os.PathLike,
    results: Mapping[str, Any],
    histories: Mapping[str, History],
    *,
    episodes: Mapping[str, Sequence[EpisodeResult]],
    pair_yields: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None,
    timing: Mapping[str, float] | None = None,
    notes: Iterable[str] = (),
) -> Path:
    """Write `report.md` and `report.png` into `output_dir`.

    Args:
        output_dir (`str`): where `videos/` lies too, if there are any.
        results (`Mapping`): the content of `results.json`.
        histories (`Mapping[str, History]`): phase -> `trainer.state.log_history` (see [`plot_report`]).
        episodes (`Mapping[str, Sequence[EpisodeResult]]`): phase -> its evaluation's rows, for the paired tests.
        pair_yields (`Mapping[str, Mapping[str, Mapping[str, int]]]`, *optional*): phase -> stage name -> outcome -> how many
            pairs of episodes (`PairSet.yield_table`), of each round of preference.
        timing (`Mapping[str, float]`, *optional*): part of the run -> seconds.
        notes (`Iterable[str]`): sentences under "How it was produced": the command, the number of demonstrations and why.

    Returns:
        the path of `report.md`.

    Raises:
        ValueError: if `results` is not complete.
    """
    output_dir = Path(output_dir)
    _check(results)
    plot_report(results, histories, output_dir / "report.png")
    phases = results["phases"]
    sections = [
        f"# {run_title(results)}",
        "![Success per phase, stage funnel and learning curves](report.png)",
        "## Success on held-out seeds\n\n" + _success_table(phases),
        "## Compared in pairs, on the same seeds\n\n" + _comparison_table(episodes),
        "## Stages\n\nP(stage | the one before it), passed / reached.\n\n" + _stage_table(phases),
    ]
    for name, pair_yield in (pair_yields or {}).items():
        of_round = "" if len(pair_yields) == 1 else f", {name}"
        sections.append(f"## Preference pairs per stage{of_round}\n\n" + _yield_table(pair_yield))
    if timing:
        total = {"total": sum(timing.values())}
        rows = [(name, format_seconds(seconds)) for name, seconds in {**timing, **total}.items()]
        sections.append("## Time\n\n" + markdown_table(("part", "time"), rows))
    if videos := _video_list(output_dir, phases):
        sections.append("## Videos\n\n" + videos)
    sections.append("## How it was produced\n\n" + _provenance(results, notes))
    path = output_dir / "report.md"
    write_atomically(path, "\n\n".join(sections) + "\n")
    return path


def format_seconds(seconds: float) -> str:
    """Example: 42 is `"42 s"`, 342 is `"5 min 42 s"`, 7320 is `"2 h 02 min"`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_seeds(seeds: Iterable[int]) -> str:
    """Runs of consecutive seeds as ranges. Example: `[1, 2, 3, 7]` is `"1-3, 7"`."""
    ranges: list[list[int]] = []
    for seed in sorted(seeds):
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table: first column to the left, the others to the right."""
    lines = [header, (":---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def stage_cells(phase: Mapping[str, Any]) -> dict[str, str]:
    """Stage name -> how often it was passed. Example: `{"Grasp": "75.0 % (3 / 4)", "Stack": "not reached"}`."""
    cells = {}
    for stage, rate in phase["stage_success"].items():
        passed, reached = phase["stage_counts"][stage]
        cells[stage] = "not reached" if rate is None else f"{100 * rate:.1f} % ({passed} / {reached})"
    return cells


def _success_table(phases: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            phase["n_episodes"],
            format_rate(phase["success_once"], phase["success_once_ci95"]),
            format_rate(phase["success_at_end"], phase["success_at_end_ci95"]),
            phase["temperature"],
            "-" if phase["env_steps"] is None else f"{phase['env_steps']:,}",
            "-" if phase["wall_s"] is None else format_seconds(phase["wall_s"]),
        )
        for name, phase in phases.items()
    ]
    header = ("phase", "n", "success once", "success at end", "temperature", "env steps of the phase", "its time")
    return markdown_table(header, rows) + "\n\nIn brackets: Wilson 95 % intervals."


def _comparison_table(episodes: Mapping[str, Sequence[EpisodeResult]]) -> str:
    """Each later phase against imitation; where that cannot be paired, the row says why."""
    rows = []
    for after in sorted({*PHASES[1:], *episodes} - {PHASES[0]}, key=phase_order):
        missing = [phase for phase in (PHASES[0], after) if phase not in episodes]
        if missing:
            rows.append((f"{after} against {PHASES[0]}", f"not evaluated: {', '.join(missing)}", "-", "-", "-"))
            continue
        rows.append((f"{after} against {PHASES[0]}", *_comparison(episodes[PHASES[0]], episodes[after])))
    header = ("success once", "difference", "only the later solved", "only the earlier solved", "p")
    return markdown_table(header, rows) + "\n\nExact McNemar test, two-sided."


def _comparison(before: Sequence[EpisodeResult], after: Sequence[EpisodeResult]) -> tuple[str, ...]:
    """Gain in points, episodes won, episodes lost, p."""
    try:
        first, second = paired(before, after)
    except ValueError as error:
        return f"not comparable: {error}", "-", "-", "-"
    test = mcnemar_exact(first, second)
    gain = 100 * (test.b_only - test.a_only) / len(first)
    return f"{gain:+.1f} points", str(test.b_only), str(test.a_only), f"{test.p_value:.2g}"


def _stage_table(phases: Mapping[str, Any]) -> str:
    cells = {name: stage_cells(phase) for name, phase in phases.items()}
    stages = list(dict.fromkeys(stage for row in cells.values() for stage in row))
    return markdown_table(
        ("stage", *phases), [(stage, *(cells[name].get(stage, "-") for name in phases)) for stage in stages]
    )


def _yield_table(pair_yield: Mapping[str, Mapping[str, int]]) -> str:
    columns = list(dict.fromkeys(column for counts in pair_yield.values() for column in counts))
    rows = [(stage, *(counts.get(column, 0) for column in columns)) for stage, counts in pair_yield.items()]
    return markdown_table(("stage", *(column.replace("_", " ") for column in columns)), rows)


def _video_list(output_dir: Path, phases: Mapping[str, Any]) -> str:
    """Links relative to the report, one line per video."""
    paths = [path for phase in phases for path in sorted((output_dir / "videos").glob(f"{phase}_*.mp4"))]
    return "\n".join(f"- [{path.stem.replace('_', ' ')}](videos/{path.name})" for path in paths)


def _provenance(results: Mapping[str, Any], notes: Iterable[str]) -> str:
    """The notes, then everything that decides the figures."""
    lines = [f"- {note}" for note in notes]
    lines += [f"- seed of the run: {results['seed']}; visuals: {results['visuals']}"]
    for name, phase in results["phases"].items():
        lines.append(
            f"- {name}: seeds {format_seeds(phase['eval_seeds'])}, sampling temperature {phase['temperature']}, at most "
            f"{phase['max_episode_steps']} steps an episode; checkpoint `{phase['checkpoint']}`"
        )
    lines.append("- versions: " + ", ".join(f"{name} {value or '-'}" for name, value in results["versions"].items()))
    lines.append("- all figures of this page are in [results.json](results.json)")
    return "\n".join(lines)


def _check(results: Mapping[str, Any]) -> None:
    """Raise unless `results` follows the schema of `results.json`."""
    _check_fields("results", results, RESULT_FIELDS)
    for name in sorted(results["phases"], key=phase_order):
        _check_fields(f'results["phases"]["{name}"]', results["phases"][name], PHASE_FIELDS)


def _check_fields(name: str, given: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Raise unless all `fields` are there."""
    if missing := [field for field in fields if field not in given]:
        raise ValueError(
            f"`{name}` must hold {', '.join(fields)}; {', '.join(missing)} is missing. Use `build_results`."
        )
