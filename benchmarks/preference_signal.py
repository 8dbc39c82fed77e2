"""How much of a preference loss's first gradient is signal? The same rollouts under several objectives.

    python -m benchmarks.preference_signal --checkpoint outputs/evidence/starts/liftpegupright_1500/imitation --task LiftPegUpright-v1 \\
        --rollouts ROLLOUTS --output_dir outputs/preference_signal

`ROLLOUTS` is a folder of episodes of that checkpoint, several from each start (`recipes/collect.py`, or what
`benchmarks/preference_learning.py` left). Its starts are dealt into `--groups`; each objective's pairs of a group give one gradient of
the loss where training begins. There every pair has the same weight, and `centered` and `beta` change nothing but noise and length.
`agreement` and `gain` are those of `benchmarks/gradient_signal.py`, the first objective (success against the other episodes from the
same start) is what gains are measured along, the second what they are compared with. `results.json` and `results.md` are its output.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.gradient_signal import ROWS, compare
from trl_stare import StagePlan, TokenPolicy, get_plan
from trl_stare.data import TrajectoryFolder, build_pairs
from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation.report import markdown_table
from trl_stare.runs import claim_folder
from trl_stare.trainers.ppo_batch import executed_tokens, observations
from trl_stare.trainers.stage_dpo_config import SUMMED

logger = logging.getLogger("preference_signal")

SUCCESS = "success"
"""The reference: each episode's success less the mean of the others from its start, for all of its steps."""
OBJECTIVES: dict[str, dict[str, str]] = {
    "tpo-mean": {"objective": "tpo-mean"},
    "tpo-sum": {"objective": "tpo-sum"},
    "sta-tpo": {"objective": "sta-tpo"},
    "sta-tpo-sum": {"objective": "sta-tpo-sum"},
    "sta-tpo, later": {"objective": "sta-tpo", "both_passed": "later"},
    "sta-tpo-sum, later": {"objective": "sta-tpo-sum", "both_passed": "later"},
}
"""Arguments of [`build_pairs`]; the first is what the others are compared with."""


def success_weights(episodes: Sequence[Trajectory]) -> list[Tensor]:
    """What each environment step of each episode counts in the gradient of success: `success - mean of the others' from its start`.

    Example: of one start, one of three episodes succeeds: 1, -1/2, -1/2. An episode without others: 0.
    """
    by_seed: dict[int, list[float]] = defaultdict(list)
    for episode in episodes:
        by_seed[episode.seed].append(float(episode.success_once))
    weights = []
    for episode in episodes:
        own, found = float(episode.success_once), by_seed[episode.seed]
        others = (sum(found) - own) / (len(found) - 1) if len(found) > 1 else own
        weights.append(torch.full((episode.num_steps,), own - others))
    return weights


def pair_weights(
    episodes: Sequence[Trajectory], plan: StagePlan, options: Mapping[str, str]
) -> tuple[list[Tensor], int]:
    """What each environment step counts in the first gradient of a preference loss, and of how many pairs.

    Each pair adds 1 to the steps of its chosen side and -1 to those of its rejected side, over their number where a side has the
    mean of its steps (less the trainer's factor `C`, which is the same for all).
    """
    weights = [torch.zeros(episode.num_steps) for episode in episodes]
    pairs = build_pairs(episodes, plan, min_cost_gap=float("inf"), **options).pairs
    for pair in pairs:
        for sign, side in ((1.0, "chosen"), (-1.0, "rejected")):
            index, start, stop = (getattr(pair, f"{side}{end}") for end in ("", "_start", "_stop"))
            weights[index][start:stop] += sign / (1 if options["objective"] in SUMMED else stop - start)
    return weights, len(pairs)


def gradients(
    policy: TokenPolicy,
    episodes: Sequence[Trajectory],
    weights: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Tensor:
    """`sum_t w_t grad log pi(a_t | s_t)` for every `w` `[T]` of `weights`, over all environment steps, an episode: `[len(weights), D]`.

    With `entropy` one row more: of the sum of all steps' entropies.
    """
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    found = torch.zeros(len(weights) + entropy, sum(parameter.numel() for parameter in parameters))
    inputs, trace = policy.prepare(observations(episodes)), torch.cat([episode.trace for episode in episodes])
    mask = torch.cat([executed_tokens(episode, trace.shape[1], policy.chunk_size) for episode in episodes])
    taken = mask.unflatten(1, (policy.chunk_size, -1)).all(dim=-1)
    # which of all environment steps each one of a chunk was
    step = (taken.flatten().cumsum(0) - 1).view_as(taken)
    for rows in torch.arange(len(trace)).split(ROWS):
        seen = {name: value[rows] for name, value in inputs.items()}
        evaluation = policy.evaluate(seen, trace[rows], temperature=temperature)
        logps = evaluation.logps.unflatten(1, (policy.chunk_size, -1)).sum(dim=-1)[taken[rows]]
        sums = [logps @ weight[step[rows][taken[rows]]] for weight in weights]
        sums += [(evaluation.entropies * mask[rows]).sum()] if entropy else []
        for index, value in enumerate(sums):
            last = index == len(sums) - 1
            parts = torch.autograd.grad(
                value, parameters, retain_graph=not last, materialize_grads=True, allow_unused=True
            )
            found[index] += torch.cat([part.flatten() for part in parts])
    return found / len(episodes)


def deal(seeds: Sequence[int], groups: int) -> list[set[int]]:
    """The starts in so many groups. Example: seeds 3, 3, 5, 7, 9 in 2 groups: `[{3, 7}, {5, 9}]`."""
    starts = sorted(set(seeds))
    return [set(starts[first::groups]) for first in range(groups)]


def open_groups(args: argparse.Namespace) -> tuple[Path, TokenPolicy, StagePlan, Iterator[list[Trajectory]]]:
    """What a command line of [`parse`] names: the folder for results, the policy, its task's plan, and the rollouts group by group."""
    out = claim_folder(
        args.output_dir, {name: str(value) for name, value in vars(args).items() if name != "output_dir"}
    )
    policy = TokenPolicy.from_pretrained(args.checkpoint)
    policy.model.eval()
    rollouts = TrajectoryFolder(args.rollouts)
    seeds = [episode.seed for episode in TrajectoryFolder(args.rollouts, images=False)]
    dealt = deal(sorted(set(seeds))[: args.starts], args.groups)
    groups = ([rollouts[i] for i, seed in enumerate(seeds) if seed in group] for group in tqdm(dealt, desc="groups"))
    return out, policy, get_plan(args.task), groups


def markdown(results: Mapping[str, Mapping[str, Any]], pairs: Mapping[str, int]) -> str:
    """The table a reader sees; standard errors behind +-, gains relative to that of the second."""
    plain = list(results)[1]
    unit = results[plain]["gain"][0]
    rows = []
    for name, row in results.items():
        more = "-" if name == plain else "{:+.2f} +- {:.2f}".format(*(value / unit for value in row["more"]))
        gained = "{:.2f} +- {:.2f}".format(*(value / unit for value in row["gain"]))
        rows.append((name, pairs.get(name, "-"), "{:.3f} +- {:.3f}".format(*row["agreement"]), gained, more))
    return markdown_table(("", "pairs", "agreement", f"gain, {plain} = 1", f"more than {plain}"), rows) + "\n"


def main(args: argparse.Namespace) -> None:
    """Compare, differentiate, tell."""
    out, policy, plan, groups = open_groups(args)
    found, pairs = defaultdict(list), dict.fromkeys(OBJECTIVES, 0)
    for episodes in groups:
        weights = {SUCCESS: success_weights(episodes)}
        for name, options in OBJECTIVES.items():
            weights[name], count = pair_weights(episodes, plan, options)
            pairs[name] += count
        rows = gradients(
            policy, episodes, [torch.cat(parts) for parts in weights.values()], temperature=args.temperature
        )
        for name, gradient in zip(weights, rows, strict=True):
            found[name].append(gradient)
    results = compare({name: torch.stack(rows) for name, rows in found.items()})
    (out / "results.json").write_text(json.dumps({"pairs": pairs, "objectives": results}, indent=1) + "\n")
    (out / "results.md").write_text(markdown(results, pairs))
    logger.info("%s", markdown(results, pairs))


def parse(description: str | None) -> argparse.Namespace:
    """The command line of what looks at the gradients of rollouts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--rollouts", type=Path, required=True, help="folder of its episodes, several from each start")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the rollouts")
    parser.add_argument("--task", default="StackCube-v1")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--starts", type=int, help="take the first so many starts only")
    parser.add_argument("--groups", type=int, default=10, help="of starts, a gradient each")
    args = parser.parse_args()
    if args.groups < 3:  # an error needs two groups that are left when one is out
        parser.error(f"`--groups` must be at least 3, got {args.groups}.")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse(__doc__))
