"""What queues have found, all of them together: one table of methods against each other, and one figure of what stages change.

    python -m benchmarks.evidence.summary docs/evidence/*.json --output docs/comparisons

From the repository's root. Writes `docs/comparisons.md` and `docs/comparisons.png`. In the figure are whole trajectories against stages only,
over how often the policy succeeds that both begin from.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.evidence.curves import COLORS
from trl_stare.evaluation import Difference, mean_difference
from trl_stare.evaluation.provenance import OTHER
from trl_stare.evaluation.report import markdown_table

logger = logging.getLogger("summary")

PHASES = {"ppo": "interaction", "tpo": "preference"}
"""What a method is part of, by its name without `sta-` and `-sum`."""
START = "start"
"""The method of a checkpoint that others are compared with: none."""
FEW = 3
"""From so many training seeds, or starts, on an interval is given: that of two is nearly always wider than the figure."""
RARE = 0.05
"""Success of a start below which it is called rare, in [0, 1]."""


@dataclass(frozen=True)
class Finding:
    """Two methods from one start, or one against the start itself, on the same held-out seeds.

    Args:
        file (`str`): name of the queue's results. task (`str`): its task.
        a (`Mapping`), b (`Mapping`): the arms, as the queue has them; `a` may be the start.
        start (`float`): success of the checkpoint they begin from, in [0, 1]. origin (`str`): what tells it from others.
        differences (`tuple[float, ...]`): `b` minus `a`, one a training seed, in [-1, 1].
        runs (`frozenset`): training seed and discordant episodes of each, by which the same runs are known in another queue's results.
        p_value (`float`): exact McNemar test of all episodes, which knows nothing of training seeds.
    """

    file: str
    task: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    start: float
    origin: str
    differences: tuple[float, ...]
    runs: frozenset[tuple[Any, ...]]
    p_value: float

    @property
    def phase(self) -> str | None:
        """`"interaction"` or `"preference"` where `a` knows nothing of stages and `b` does; `None` for other pairs."""
        phases = {PHASES.get(arm["method"].removeprefix("sta-").removesuffix("-sum")) for arm in (self.a, self.b)}
        return phases.pop() if len(phases) == 1 and not _knows_stages(self.a) and _knows_stages(self.b) else None

    @property
    def mean(self) -> Difference | None:
        """Over training seeds, with Student's interval; `None` for a single one."""
        return mean_difference(self.differences) if len(self.differences) > 1 else None

    @property
    def rounds(self) -> int:
        """Of preference."""
        return self.b.get("rounds", 1)  # older results had one

    @property
    def normalised(self) -> bool:
        """Whether `b` has its advantages normalised by stages."""
        return self.b["ppo"].get("advantage_norm") == "stage"


def _knows_stages(arm: Mapping[str, Any]) -> bool:
    return arm["method"].startswith("sta-") or arm["ppo"].get("advantage_norm") == "stage"


def findings(results: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Methods against each other and the start in all `results`, from the rarest success on; runs that several queues share count once, where most are.

    Args:
        results (`Mapping`): name of a file -> content of a `results.json`; others, without comparisons, are passed over.
    """
    best: dict[tuple[Any, ...], list[Finding]] = {}
    for file, content in sorted(results.items()):
        arms = {arm["name"]: arm for arm in content.get("queue", {}).get("arms", ())}
        for test in content.get("comparisons", ()):
            b = arms[test["b"]]
            a = arms.get(test["a"], {"name": b["start"], "method": START, "ppo": {}})
            found = _finding(file, content, a, b, test)
            alike = best.setdefault((found.task, found.origin, test["a"], test["b"]), [])
            if not any(found.runs <= other.runs for other in alike):
                alike[:] = [other for other in alike if not other.runs <= found.runs] + [found]
    return sorted(chain(*best.values()), key=lambda found: (found.start, found.task, found.file))


def _finding(file: str, content: Mapping[str, Any], a: Any, b: Any, test: Mapping[str, Any]) -> Finding:
    files = content["checkpoints"][b["start"]]["files"]
    # several files where they are sharded
    weights = [files[name] for name in sorted(files) if name.endswith((".safetensors", ".bin")) and name not in OTHER]
    return Finding(
        file=file,
        task=content["queue"]["task"],
        a=a,
        b=b,
        start=content["starts"][b["start"]]["success_once"],
        origin=f"{' '.join(weights)} at {content['queue']['temperature']}",
        differences=tuple(part["difference"] for part in test["per_seed"].values()),
        runs=frozenset((seed, part["a_only"], part["b_only"]) for seed, part in test["per_seed"].items()),
        p_value=test["p_value"],
    )


def table(found: Iterable[Finding]) -> str:
    """All of several training seeds, as Markdown."""
    header = ("start, %", "", "each training seed, points", "mean, interval over training seeds", "p of all episodes")
    rows = [
        (
            f"{100 * one.start:.1f}",
            f"{one.a['name']} -> {one.b['name']}, {one.task}, `{one.file}`",
            ", ".join(f"{100 * difference:+.1f}" for difference in one.differences),
            _interval(one.mean),
            f"{one.p_value:.2g}",
        )
        for one in found
        if one.mean is not None
    ]
    return markdown_table(header, rows)


def _interval(difference: Difference) -> str:
    """As a column whose heading has the unit."""
    return str(difference).replace(" points", "")


def over_starts(found: Iterable[Finding]) -> str:
    """What stages change over all starts that two methods had, as Markdown, from [`FEW`] starts on.

    A start counts once, with the mean of its training runs, one or many: whether stages help differs from start to start, and the interval is to
    say how they do on one that is not among these.

    Example: `ppo -> sta-ppo` with +12 and -1 points from one start, +1 from a second and +3 from a third: the mean of +5.5, +1.0 and +3.0, +3.2 points.
    """
    methods: dict[tuple[bool, str], dict[tuple[str, str], list[float]]] = {}
    for one in found:
        if one.phase is not None:
            starts = methods.setdefault((one.start >= RARE, f"{one.a['name']} -> {one.b['name']}"), {})
            starts.setdefault((one.task, one.origin), []).extend(one.differences)
    header = ("success at the start", "", "starts", "pairs of runs", "points, interval over starts", "starts above 0")
    rows = []
    for (frequent, names), starts in sorted(methods.items()):
        means = [mean(differences) for differences in starts.values()]
        if len(means) >= FEW:
            band = f"{100 * RARE:.0f} % or more" if frequent else f"below {100 * RARE:.0f} %"
            pairs, above = sum(map(len, starts.values())), sum(value > 0 for value in means)
            rows.append((band, names, len(means), pairs, _interval(mean_difference(means)), above))
    return markdown_table(header, rows)


def page(found: Sequence[Finding], picture: str) -> str:
    """The table with what a reader must know. picture (`str`): where the figure is."""
    return f"""# Methods against each other, over training seeds

Made of the queues' results by `python -m benchmarks.evidence.summary docs/evidence/*.json`; [results.md](results.md) explains each line.

![What stages add to success, over the success of the policy that both methods begin from]({picture})

Large: the mean over {FEW} or more training seeds with Student's 95 % interval, as a diamond where advantages are normalised by stages, with the number of rounds where there are several; small: one training seed. Only methods that know nothing of
stages against those that do are in the figure and the first table. In the others are all that have two training seeds or more, from the rarest success on; the last
column is the exact McNemar test of all their episodes, which knows nothing of how much training varies.

## Over starts

Does it help to know stages, whatever one begins from? Each start (a task, its checkpoint and the temperature) counts once, by the mean of its training runs, of which some have only one; Student's 95 % interval over starts. Starts of one task are not as
different as tasks are, so the intervals are rather too narrow; runs with [stages as they were](results.md#results) are among them. Methods that had {FEW} starts or more:

{over_starts(found)}

## From each start

{table(one for one in found if one.a["method"] != START)}

## Against the start

{table(one for one in found if one.a["method"] == START)}
"""


def plot(path: Path, found: Iterable[Finding]) -> None:
    """What stages change in each phase, over the success of the start. path (`Path`): of the picture."""
    shown = [one for one in found if one.phase is not None]
    colors = dict(zip(sorted({one.task for one in shown}), cycle(COLORS), strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, (phase, title) in zip(
        panels, (("interaction", "PPO -> StA-PPO"), ("preference", "TPO -> StA-TPO")), strict=True
    ):
        _plot_phase(panel, [one for one in shown if one.phase == phase], colors)
        panel.set_title(f"{phase.title()}: {title}", fontsize=10, loc="left")
        panel.set_xlabel("success of the policy that both begin from, %")
    panels[0].set_ylabel("what stages add to success, points")
    names = {task: plt.Line2D([], [], color=color, marker="o", ls="") for task, color in colors.items()}
    names["normalised by stages"] = plt.Line2D([], [], color="grey", marker="D", ls="")
    names["one training seed"] = plt.Line2D([], [], color="grey", marker="o", ms=3, alpha=0.6, ls="")
    figure.legend(names.values(), names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _plot_phase(panel: Axes, found: Sequence[Finding], colors: Mapping[str, str]) -> None:
    columns = [round(100 * one.start, 1) for one in found]
    for index, (one, column) in enumerate(zip(found, columns, strict=True)):
        # side by side round the success that they begin from
        place = columns[:index].count(column) - (columns.count(column) - 1) / 2
        x = (column if column else 0.02) * 1.07**place
        points, color = [100 * difference for difference in one.differences], colors[one.task]
        marker = "D" if one.normalised else "o"
        panel.plot([x] * len(points), points, marker, color=color, ms=3, alpha=0.6, mew=0)
        if len(points) < FEW:
            continue
        value, low, high = (100 * part for part in one.mean)
        panel.errorbar([x], [value], [[value - low], [high - value]], fmt=marker, color=color, capsize=3, ms=6, lw=1.2)
        if one.rounds > 1:
            panel.annotate(str(one.rounds), (x, high), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    panel.axhline(0, color="black", lw=0.8)
    panel.set_xscale("symlog", linthresh=0.1, linscale=0.4)
    panel.set_xlim(-0.02, 100)
    panel.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    panel.spines[["top", "right"]].set_visible(False)


def main(files: Iterable[Path], output: Path) -> None:
    """Read, write both."""
    found = findings({file.stem: json.loads(file.read_text()) for file in files})
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = output.with_suffix(".png")
    output.with_suffix(".md").write_text(page(found, picture.name))
    plot(picture, found)
    logger.info("%d comparisons, written to %s.md and .png", len(found), output)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="`results.json` of queues, under any names.")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/comparisons"), help="Of .md and .png, without the ending."
    )
    arguments = parser.parse_args()
    main(arguments.files, arguments.output)
