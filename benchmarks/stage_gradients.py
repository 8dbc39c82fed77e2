"""Do stages pull a policy in one direction? Cosines between the gradients of its stages, of whole trajectories and of less noise.

    python -m benchmarks.stage_gradients --checkpoint outputs/ipi/imitation --task StackCube-v1 --temperature 3.0 \\
        --rollouts ROLLOUTS --output_dir outputs/stage_gradients

`ROLLOUTS` are episodes of that checkpoint, sampled at that temperature. Each stage has the first gradient of StA-TPO on all that passed
it against all that failed in it, `whole` that of TPO on successes against failures, both a mean over a side's environment steps, and `sharper` is
the gradient that lowers the entropy of every decision and knows nothing of outcomes. A cosine is taken between gradients of different
groups of starts and corrected for their noise, so that equal directions have 1 however few episodes there are; +- is one standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.gradient_signal import between, jackknife
from benchmarks.preference_signal import gradients, open_groups, parse
from trl_stare import StagePlan
from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation.report import markdown_table
from trl_stare.stages import Segment, segment

logger = logging.getLogger("stage_gradients")

WHOLE, SHARPER = "whole", "sharper"


def contrast(sides: Sequence[tuple[slice, bool] | None], sizes: Sequence[int]) -> list[Tensor]:
    """What each environment step of each episode counts in the mean of those that passed less the mean of those that failed.

    Args:
        sides (`Sequence`): of each episode the steps that are compared, and whether it passed; `None`: it takes no part.
        sizes (`Sequence[int]`): how many steps each episode has.

    Where all passed, or none, there is nothing to compare, and all is 0.

    Example: two steps of an episode that passed, one each of two that failed: 1/2, 1/2; -1/2; -1/2.
    """
    counts = {passed: sum(side is not None and side[1] is passed for side in sides) for passed in (True, False)}
    weights = [torch.zeros(size) for size in sizes]
    for weight, side in zip(weights, sides, strict=True):
        if side is not None and all(counts.values()):
            steps, passed = side
            weight[steps] = (1.0 if passed else -1.0) / (counts[passed] * (steps.stop - steps.start))
    return weights


def contrasts(episodes: Sequence[Trajectory], plan: StagePlan) -> dict[str, Tensor]:
    """`whole` and every stage -> what each environment step of all episodes counts, `[T]`."""
    sizes = [episode.num_steps for episode in episodes]
    cuts = [segment(plan, episode.signals) for episode in episodes]
    sides = {WHOLE: [(slice(0, size), e.success_once) for e, size in zip(episodes, sizes, strict=True)]}
    for stage, name in enumerate(plan.names):
        sides[name] = [_side(parts, stage) for parts in cuts]
    return {name: torch.cat(contrast(of, sizes)) for name, of in sides.items()}


def _side(parts: Sequence[Segment], stage: int) -> tuple[slice, bool] | None:
    """The steps of a stage and whether it was passed; `None` if it was not reached or passed without a step."""
    if len(parts) <= stage or parts[stage].start == parts[stage].stop:
        return None
    return slice(parts[stage].start, parts[stage].stop), parts[stage].passed


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of the directions that batches `[B, D]` have in common; `nan` where one of them has none.

    Example: rows `[1, 1, 0]`, `[1, -1, 0]` and `[1, 0, 1]` against themselves: 1, though the rows are far apart.
    """
    return between(a, b) / (between(a, a).sqrt() * between(b, b).sqrt())


def cosines(found: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[float | None, ...]]]:
    """Name -> other name -> cosine and standard error, of gradients `[B, D]`; `None` for what noise leaves nothing of."""
    measured = {a: {b: jackknife(cosine, found[a], found[b]) for b in found if b != a} for a in found}
    return {
        a: {b: tuple(None if math.isnan(value) else value for value in pair) for b, pair in row.items()}
        for a, row in measured.items()
    }


def markdown(results: Mapping[str, Mapping[str, Sequence[float | None]]]) -> str:
    """The table a reader sees, with ? for what is not known."""

    def cell(value: float | None, error: float | None) -> str:
        return "?" if value is None else f"{value:+.2f} +- " + ("?" if error is None else f"{error:.2f}")

    names = list(results)
    rows = [(a, *(cell(*results[a][b]) if a != b else "-" for b in names)) for a in names]
    return markdown_table(("", *names), rows) + "\n"


def main(args: argparse.Namespace) -> None:
    """Differentiate group by group, compare, tell."""
    out, policy, plan, groups = open_groups(args)
    found: dict[str, list[Tensor]] = {}
    for episodes in groups:
        weights = contrasts(episodes, plan)
        *rows, noisier = gradients(
            policy, episodes, list(weights.values()), temperature=args.temperature, entropy=True
        )
        for name, gradient in zip((*weights, SHARPER), (*rows, -noisier), strict=True):
            found.setdefault(name, []).append(gradient)
    results = cosines({name: torch.stack(rows) for name, rows in found.items()})
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(markdown(results))
    logger.info("%s", markdown(results))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse(__doc__))
