"""One self-contained page about any number of evaluations: tables, stage funnels, curves, and what failures look like."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trl_stare.evaluation.eval_info import RULES, read_eval_info
from trl_stare.evaluation.played import PlayedEpisode, read_played
from trl_stare.evaluation.report import markdown_table
from trl_stare.evaluation.statistics import Proportion, format_rate

CURVES = {
    ("rollout/success_once", "success in rollouts"): ("rollout/env_steps", "environment steps"),
    ("rewards/accuracies", "pairs told apart"): ("step", "updates"),
    ("loss", "loss"): ("step", "updates"),
}
"""What is drawn of a training's log, over what: names in the log and on the page."""

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem 3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
@media (max-width: 40rem) {
  table { font-size: .75rem; }
  th, td { padding: .3rem .25rem; white-space: normal; }
}
img.plot { width: 100%; height: auto; background: #fff; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .5rem; }
.gallery figure { margin: 0; }
.gallery img { width: 100%; display: block; }
figcaption { font-size: .8rem; }
"""
"""On a phone tables get narrow; where that is not enough they scroll by themselves, so that the page never does sideways."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation as a page shows it.

    Args:
        name (`str`): of its column and heading.
        info (`Mapping`): the content of `eval_info.json`.
        episodes (`Mapping`): task -> its rows.
        history (`Sequence[Mapping]`): `log_history` of the training it came from; empty if none is known.
    """

    name: str
    info: Mapping[str, Any]
    episodes: Mapping[str, Sequence[PlayedEpisode]]
    history: Sequence[Mapping[str, Any]] = field(default=())

    @classmethod
    def load(cls, folder: str | Path, *, name: str | None = None, history: str | Path | None = None) -> Evaluation:
        """Read what recipes/evaluate.py wrote.

        Args:
            folder (`str` or `Path`): of the evaluation.
            name (`str`, *optional*): by default the folder's.
            history (`str` or `Path`, *optional*): a `trainer_state.json`.
        """
        folder, info = Path(folder), read_eval_info(folder)
        tasks = [task["task"] for task in info["per_task"]]
        episodes = {task: read_played(folder / "episodes" / f"{task}.parquet") for task in tasks}
        log = json.loads(Path(history).read_text())["log_history"] if history else ()
        return cls(name or folder.resolve().name, info, episodes, log)

    def metrics(self, task: str) -> Mapping[str, Any] | None:
        """What is said of `task`; `None` if it was not evaluated."""
        return next((each["metrics"] for each in self.info["per_task"] if each["task"] == task), None)


def distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """A name for each folder: its own, and where that repeats the shortest end of its path that is no other's.

    Example: of `["ppo/eval", "dpo/eval", "sft"]` they are `["ppo/eval", "dpo/eval", "sft"]`, of `["eval/ppo", "eval/dpo"]` `["ppo", "dpo"]`.
    """
    paths = [Path(folder).resolve().parts for folder in folders]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        parts = 1
        while any(other[-parts:] == path[-parts:] for other in others):
            parts += 1
        names.append(Path(*path[-parts:]).as_posix())
    return names


def failed_in(episodes: Sequence[PlayedEpisode], stages: Sequence[str], rule: str) -> dict[str, list[PlayedEpisode]]:
    """Failures by the stage in which they ended; episodes that passed all stages and lost it are under `"Lost at the end"`.

    Args:
        episodes (`Sequence[PlayedEpisode]`): of one task. stages (`Sequence[str]`): its stages, in order.
        rule (`str`): `success_once` or `success_at_end`.

    Example: with stages Reach and Push, an episode whose last segment is of stage 1 and not passed is under `"Push"`.
    """
    groups: dict[str, list[PlayedEpisode]] = {name: [] for name in (*stages, "Lost at the end")}
    for episode in episodes:
        if not episode.void and not getattr(episode.result, rule):
            last = episode.result.segments[-1]
            groups["Lost at the end" if last.passed else stages[last.stage]].append(episode)
    return {name: group for name, group in groups.items() if group}


def tables(evaluations: Sequence[Evaluation]) -> list[tuple[str, Sequence[str], list[tuple]]]:
    """Heading, columns and rows of every table: success of all, then the stages of each task."""
    rows = []
    for each in evaluations:
        for task in each.info["per_task"]:
            found = task["metrics"]
            shares = (format_rate(found[rule], found[f"{rule}_ci95"]) for rule in RULES)
            rows.append((each.name, task["task"], found["n_episodes"], *shares, found["n_voided"]))
    found_tables: list[tuple[str, Sequence[str], list[tuple]]] = [
        ("Success", ("policy", "task", "n", "success once", "success at end", "voided"), rows)
    ]
    for task in _tasks(evaluations):
        stages = []
        for each in evaluations:
            for name, stage in ((each.metrics(task) or {}).get("stages") or {}).items():
                share = "not reached" if stage["rate"] is None else format_rate(stage["rate"], stage["ci95"])
                stages.append((name, each.name, stage["reached"], stage["passed"], share))
        header = ("stage", "policy", "reached", "passed", "P(stage given the one before)")
        found_tables.append((f"{task}: stages", header, stages))
    return found_tables


def plot_funnel(evaluations: Sequence[Evaluation], task: str) -> Figure:
    """Share of all episodes of `task` that passed each stage, with Wilson bars."""
    shown = [each for each in evaluations if each.metrics(task)]
    figure = Figure(figsize=(5.5, 3.0), layout="constrained")
    panel, width = figure.subplots(), 0.84 / len(shown)
    # plans may differ: an own task's that was changed
    stages = list(dict.fromkeys(name for each in shown for name in each.metrics(task)["stages"]))
    for index, each in enumerate(shown):
        found = each.metrics(task)
        shares = [Proportion(stage["passed"], found["n_episodes"]) for stage in found["stages"].values()]
        low, high = zip(*(share.wilson() for share in shares), strict=True)
        rates = [share.rate for share in shares]
        x = [stages.index(name) + (index - (len(shown) - 1) / 2) * width for name in found["stages"]]
        # Wilson's ends may miss a rate of exactly 0 or 1 by a rounding error; matplotlib refuses negative bars
        error = [
            [max(0.0, 100 * (r - end)) for r, end in zip(rates, low, strict=True)],
            [max(0.0, 100 * (end - r)) for r, end in zip(rates, high, strict=True)],
        ]
        label = f"{each.name}, n = {found['n_episodes']}"
        panel.bar(x, [100 * rate for rate in rates], 0.94 * width, yerr=error, capsize=3, label=label)
    panel.set_xticks(range(len(stages)), stages)
    panel.set_ylim(0, 105)
    panel.set_ylabel("% of episodes past the stage")
    figure.legend(loc="outside lower center", ncols=min(3, len(shown)), frameon=False)
    return figure


def plot_curves(evaluations: Sequence[Evaluation]) -> Figure | None:
    """One panel per logged quantity of `CURVES`, one line per training; `None` if nothing was logged."""
    lines = {
        (y_label, x_label): [
            (each.name, points)
            for each in evaluations
            if (points := [(row[x], row[y]) for row in each.history if x in row and y in row])
        ]
        for (y, y_label), (x, x_label) in CURVES.items()
    }
    lines = {axes: found for axes, found in lines.items() if found}
    if not lines:
        return None
    figure = Figure(figsize=(5.5, 2.6 * len(lines)), layout="constrained")
    for panel, ((y, x), found) in zip(figure.subplots(len(lines), 1, squeeze=False)[:, 0], lines.items(), strict=True):
        for name, points in found:
            panel.plot(*zip(*points, strict=True), label=name)
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.legend(frameon=False)
    return figure


def html_page(title: str, evaluations: Sequence[Evaluation], *, most: int = 12) -> str:
    """The page, with every picture in it.

    Args:
        title (`str`): heading.
        evaluations (`Sequence[Evaluation]`): at least one.
        most (`int`): failures shown of each stage.

    Raises:
        ValueError: if there is no evaluation.
    """
    if not evaluations:
        raise ValueError("`evaluations` must hold at least one, got none.")
    success, *stages = tables(evaluations)
    parts = [f"<h1>{html.escape(title)}</h1>", _html_table(*success)]
    if curves := plot_curves(evaluations):
        parts += ["<h2>Learning curves</h2>", _plot(curves, "learning curves")]
    for task, table in zip(_tasks(evaluations), stages, strict=True):
        parts += [_html_table(*table), _plot(plot_funnel(evaluations, task), f"stage funnel of {task}")]
        for each in evaluations:
            parts += _gallery(each, task, most)
    parts += ["<h2>How it was produced</h2>", *(_provenance(each) for each in evaluations)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


def markdown_page(title: str, evaluations: Sequence[Evaluation]) -> str:
    """The tables of the page, and how many failures ended in which stage."""
    sections = [f"# {title}"]
    sections += [f"## {name}\n\n{markdown_table(header, rows)}" for name, header, rows in tables(evaluations)]
    failures = []
    for each in evaluations:
        for task, episodes in each.episodes.items():
            groups = failed_in(episodes, tuple(each.metrics(task)["stages"]), each.info["settings"]["success_rule"])
            failures += [(each.name, task, stage, len(group)) for stage, group in groups.items()]
    sections.append("## Failures\n\n" + markdown_table(("policy", "task", "ended in", "episodes"), failures))
    sections.append("In brackets: Wilson 95 % intervals.")
    return "\n\n".join(sections) + "\n"


def _tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    return list(dict.fromkeys(task["task"] for each in evaluations for task in each.info["per_task"]))


def _html_table(name: str, header: Sequence[str], rows: Sequence[Sequence]) -> str:
    def line(cells: Sequence, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<h2>{html.escape(name)}</h2><div class="wide"><table>{line(header, "th")}{body}</table></div>'


def _plot(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    return f'<img class="plot" alt="{html.escape(alt)}" src="{_inline(buffer.getvalue())}">'


def _gallery(each: Evaluation, task: str, most: int) -> list[str]:
    """Last frames of the failures, by stage."""
    if each.metrics(task) is None:
        return []
    parts = []
    rule = each.info["settings"]["success_rule"]
    for stage, group in failed_in(each.episodes[task], tuple(each.metrics(task)["stages"]), rule).items():
        shown = "".join(
            f'<figure><img alt="last frame of seed {episode.result.seed}" src="{_inline(episode.final_image)}">'
            f"<figcaption>seed {episode.result.seed}</figcaption></figure>"
            for episode in group[:most]
        )
        heading = (
            f"{each.name}: {len(group)} failed in {stage}"
            if stage != "Lost at the end"
            else f"{each.name}: {len(group)} lost it at the end"
        )
        parts.append(f'<h3>{html.escape(heading)}</h3><div class="gallery">{shown}</div>')
    return parts


def _provenance(each: Evaluation) -> str:
    known = {name: each.info[name] for name in ("policy", "settings", "versions")}
    text = html.escape(json.dumps(known, indent=1))
    return f'<details><summary>{html.escape(each.name)}</summary><div class="wide"><pre>{text}</pre></div></details>'


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
