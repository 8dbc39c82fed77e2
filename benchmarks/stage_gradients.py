"""Do stages pull a policy in one direction? Cosines between the gradients of its stages, of whole trajectories and of less noise.

    python -m benchmarks.stage_gradients --checkpoint outputs/ipi/imitation --task StackCube-v1 --temperature 3.0 \\
        --rollouts ROLLOUTS --output_dir outputs/stage_gradients

`ROLLOUTS` are episodes of that checkpoint, sampled at that temperature. Each stage has the first gradient of StA-TPO on all that passed
it against all that failed in it, `whole` that of TPO on successes against failures, both a mean over a side's decisions, and `sharper` is
the gradient that lowers the entropy of every decision and knows nothing of outcomes. A cosine is taken between gradients of different
groups of starts and corrected for their noise, so that equal directions have 1 however few episodes there are; +- is one standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.gradient_signal import between, jackknife
from benchmarks.preference_signal import deal, gradients
from trl_stare import StagePlan, TokenPolicy, get_plan
from trl_stare.data import TrajectoryFolder
from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation.report import markdown_table
from trl_stare.runs import claim_folder
from trl_stare.stages import segment

logger = logging.getLogger("stage_gradients")

WHOLE, SHARPER = "whole", "sharper"


def contrast(sides: Sequence[tuple[Tensor, bool] | None], sizes: Sequence[int]) -> list[Tensor]:
    """What each decision of each episode counts in the mean of those that passed less the mean of those that failed.

    Args:
        sides (`Sequence`): of each episode the decisions that are compared, and whether it passed; `None`: it takes no part.
        sizes (`Sequence[int]`): how many decisions each episode has.

    Where all passed, or none, there is nothing to compare, and all is 0.

    Example: two decisions of an episode that passed, one each of two that failed: 1/2, 1/2; -1/2; -1/2.
    """
    counts = {passed: sum(side is not None and side[1] is passed for side in sides) for passed in (True, False)}
    weights = [torch.zeros(size) for size in sizes]
    for weight, side in zip(weights, sides, strict=True):
        if side is not None and all(counts.values()):
            decisions, passed = side
            weight[decisions] = (1.0 if passed else -1.0) / (counts[passed] * len(decisions))
    return weights


def contrasts(episodes: Sequence[Trajectory], plan: StagePlan) -> dict[str, Tensor]:
    """`whole` and every stage -> what each decision of all episodes counts, `[M]`."""
    sizes = [len(episode.starts) for episode in episodes]
    cuts = [segment(plan, episode.signals) for episode in episodes]
    sides = {WHOLE: [(torch.arange(size), e.success_once) for e, size in zip(episodes, sizes, strict=True)]}
    for stage, name in enumerate(plan.names):
        parts = [segments[stage] if len(segments) > stage else None for segments in cuts]
        acts = [
            part and episode.decisions_in(part.start, part.stop) for part, episode in zip(parts, episodes, strict=True)
        ]
        sides[name] = [
            (decisions, part.passed) if part and len(decisions) else None
            for decisions, part in zip(acts, parts, strict=True)
        ]
    return {name: torch.cat(contrast(of, sizes)) for name, of in sides.items()}


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
    out = claim_folder(
        args.output_dir, {name: str(value) for name, value in vars(args).items() if name != "output_dir"}
    )
    policy, plan = TokenPolicy.from_pretrained(args.checkpoint), get_plan(args.task)
    policy.model.eval()
    rollouts = TrajectoryFolder(args.rollouts)
    seeds = [episode.seed for episode in TrajectoryFolder(args.rollouts, images=False)]
    chosen = set(sorted(set(seeds))[: args.starts])
    found: dict[str, list[Tensor]] = {}
    for group in tqdm(deal(sorted(chosen), args.groups), desc="groups"):
        episodes = [rollouts[index] for index, seed in enumerate(seeds) if seed in group]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--rollouts", type=Path, required=True, help="folder of its episodes, several from each start")
    parser.add_argument("--temperature", type=float, required=True, help="of the rollouts")
    parser.add_argument("--task", default="StackCube-v1")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--starts", type=int, help="take the first so many starts only")
    parser.add_argument("--groups", type=int, default=6, help="of starts, a gradient each")
    arguments = parser.parse_args()
    if arguments.groups < 3:  # an error needs two groups that are left when one is out
        parser.error(f"`--groups` must be at least 3, got {arguments.groups}.")
    main(arguments)
