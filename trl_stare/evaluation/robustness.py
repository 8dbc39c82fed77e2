"""What one change of a task at a time costs a policy, and which of two policies bears it better, paired on identical starts."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from trl_stare.evaluation.comparison import Comparison, compare
from trl_stare.evaluation.played import PlayedEpisode
from trl_stare.evaluation.report import compact_json, markdown_table
from trl_stare.evaluation.statistics import holm
from trl_stare.files import write_atomically
from trl_stare.interfaces import NOMINAL

FILE = "robustness.json"
"""In the folder of `evaluate.py --variations`, written when all variations are played."""

Robustness = Mapping[str, Mapping[str, Comparison]]
"""Task (or `"all tasks"`) -> variation -> nominal (`a`) against varied (`b`)."""


def measure_robustness(
    nominal: Sequence[PlayedEpisode], varied: Mapping[str, Sequence[PlayedEpisode]], *, rule: str
) -> dict[str, dict[str, Comparison]]:
    """Compare every variation with the nominal task on the starts that both played and nothing spoiled.

    Args:
        nominal (`Sequence[PlayedEpisode]`): rows of the task (or tasks) as it is.
        varied (`Mapping[str, Sequence[PlayedEpisode]]`): variation -> its rows.
        rule (`str`): `"success_once"` or `"success_at_end"`.

    Raises:
        ValueError: if there is no variation, or one has no start in common with `nominal`.
    """
    if not varied:
        raise ValueError("`varied` must hold at least one variation, got none.")
    found: dict[str, dict[str, Comparison]] = {}
    for name, rows in varied.items():
        stages = {row.task: () for row in rows}
        for task, (success, *_) in compare(nominal, rows, stages, rules=(rule, rule)).items():
            found.setdefault(task, {})[name] = success
    return found


def robustness_info(found: Robustness, *, rule: str, what: Mapping[str, str]) -> dict[str, Any]:
    """The content of `robustness.json`: rates and differences in [0, 1] and [-1, 1], intervals of 95 %.

    Args:
        found (`Mapping`): what [`measure_robustness`] gives.
        rule (`str`): the success rule. what (`Mapping[str, str]`): variation -> what it changes.
    """
    return {
        "success_rule": rule,
        "per_task": {
            task: {
                name: {
                    "what": what[name],
                    "n_episodes": c.b.n,
                    "nominal": c.a.rate,
                    "nominal_ci95": list(c.a.wilson()),
                    "varied": c.b.rate,
                    "varied_ci95": list(c.b.wilson()),
                    "difference": c.difference.value,
                    "difference_ci95": [c.difference.low, c.difference.high],
                    "only_nominal": c.test.a_only,
                    "only_varied": c.test.b_only,
                    "p_value": c.test.p_value,
                    "p_holm": adjusted,
                }
                for (name, c), adjusted in zip(variations.items(), _adjusted(variations), strict=True)
            }
            for task, variations in found.items()
        },
    }


def robustness_table(found: Robustness, *, rule: str, what: Mapping[str, str]) -> str:
    """The same as Markdown; see [`robustness_info`]."""
    header = ("variation", "what changes", "n", "success", "difference to nominal", "lost", "won", "p", "p (Holm)")
    parts = []
    for task, variations in found.items():
        widest = max(variations.values(), key=lambda comparison: comparison.a.n).a
        rows = [(NOMINAL, "", widest.n, widest, "", "", "", "", "")]
        for (name, c), adjusted in zip(variations.items(), _adjusted(variations), strict=True):
            tests = (c.test.a_only, c.test.b_only, f"{c.test.p_value:.2g}", f"{adjusted:.2g}")
            rows.append((name, what[name], c.b.n, c.b, c.difference, *tests))
        parts.append(f"**{task}**\n\n{markdown_table(header, rows)}")
    note = (
        f"Success rule: {rule}. In brackets: 95 % intervals, Wilson's of the rates and Newcombe's of the paired difference (1998, "
        "method 10). Lost: episodes solved in the nominal task only; won: with the variation only. p: exact McNemar test, "
        "two-sided; p (Holm): corrected for the number of variations in the table."
    )
    return "\n\n".join([*parts, note])


def write_robustness(folder: str | os.PathLike, found: Robustness, *, rule: str, what: Mapping[str, str]) -> None:
    """Write `robustness.json` and `robustness.md` into `folder`, each all or nothing."""
    info = robustness_info(found, rule=rule, what=what)
    write_atomically(Path(folder) / FILE, compact_json(info) + "\n")
    write_atomically(Path(folder) / "robustness.md", robustness_table(found, rule=rule, what=what) + "\n")


def played_variations(folder: str | os.PathLike) -> tuple[str, ...]:
    """`"nominal"` and the variations that [`write_robustness`] summed up in `folder`; none in that of a single evaluation."""
    file = Path(folder) / FILE
    if not file.is_file():
        return ()
    per_task = json.loads(file.read_text(encoding="utf-8"))["per_task"]
    return NOMINAL, *dict.fromkeys(name for variations in per_task.values() for name in variations)


def compare_varied(
    a: Mapping[str, Sequence[PlayedEpisode]],
    b: Mapping[str, Sequence[PlayedEpisode]],
    *,
    rules: tuple[str, str] = ("success_once", "success_once"),
    together: bool = False,
) -> dict[str, list[Comparison]]:
    """Compare the success of two policies under each variation, all tasks together.

    Args:
        a (`Mapping`), b (`Mapping`): variation -> its rows.
        rules (`tuple[str, str]`): when an episode of `a` and of `b` counts as solved.
        together (`bool`): put `"all variations"` first, without the nominal task. It is meant for [`compare_runs`]: one start
            comes again under each variation, so that p and interval of a single comparison would count it for several.

    Raises:
        ValueError: if they are of other variations, or one has no start in common.
    """
    if a.keys() != b.keys():
        raise ValueError(f"`a` and `b` must be of the same variations, got {sorted(a)} and {sorted(b)}.")
    found = {name: [_success(a[name], b[name], rules)] for name in a}
    varied = [name for name in a if name != NOMINAL]
    if not together or len(varied) < 2:
        return found
    mixed = ([replace(row, task=f"{row.task} {name}") for name in varied for row in side[name]] for side in (a, b))
    return {"all variations": [_success(*mixed, rules)], **found}


def plot_variations(images: Mapping[str, np.ndarray], path: str | os.PathLike, *, columns: int = 5) -> None:
    """Draw pictures of the same moment side by side.

    Args:
        images (`Mapping[str, ndarray]`): name -> `[H, W, 3]` uint8.
        path (`str`): the PNG.
        columns (`int`): pictures in a row.
    """
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 1.95 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, image) in zip(axes, images.items(), strict=False):
        axis.imshow(image)
        axis.set_title(name, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # 256 colours: a third of the bytes, and no difference to the eye
    Image.open(drawn).convert("RGB").quantize(256).save(path, format="PNG", optimize=True)


def _success(a: Sequence[PlayedEpisode], b: Sequence[PlayedEpisode], rules: tuple[str, str]) -> Comparison:
    found = compare(a, b, {row.task: () for row in a}, rules=rules)
    return next(iter(found.values()))[0]  # of all tasks, if there are several


def _adjusted(variations: Mapping[str, Comparison]) -> list[float]:
    return holm([comparison.test.p_value for comparison in variations.values()])
