"""How much of PPO's first update is signal? The same episodes under several rewards, critics and GAE decays.

    python -m benchmarks.gradient_signal --checkpoint outputs/evidence/starts/liftpegupright_400/imitation --task LiftPegUpright-v1 \\
        --output_dir outputs/gradient_signal

Plays batches of episodes with one checkpoint, each as large as an iteration of PPO. For every setting of `gradient_signal.yaml` a
critic learns from the first `--warmup` of them, as it does while the policy waits; each of the others then gives one policy gradient
`g_i`. What is chance in one batch is not in another, so that inner products of *different* batches tell what is not chance:

- `agreement`, mean `g_i . g_j` over mean `g_i . g_i`: the share of a gradient's squared length that all batches have in common: what is
  right in it, and what a wrong critic, the same for all batches, adds to each;
- `gain`, mean `g_i . r_j / |g_i|`: what a step of length 1 along one batch's gradient adds to success, to first order and up to a factor
  that all settings share. `r` is the gradient of success itself, the first setting's: the task's reward alone, not discounted, no
  critic's guess of what is to come (lambda 1).

Standard errors by jackknife over batches. Gains share the noise of `r`; their difference to the second setting's, on the same batches,
has less of it. Cheaper than a training run, and about its beginning only. The same command continues: what is there is kept, also when
settings are added. `results.json` and `results.md` are its output.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import set_seed

from trl_stare import StagePPOConfig, StagePPOTrainer, TokenPolicy, get_plan, make_env
from trl_stare.data import load_trajectories, save_trajectories
from trl_stare.data.rollout import play
from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation.report import markdown_table
from trl_stare.runs import claim_folder
from trl_stare.trainers.actor_critic import SIMULATOR_CRITICS
from trl_stare.trainers.ppo_batch import observations
from trl_stare.trainers.ppo_terms import ppo_terms
from trl_stare.trainers.rollout_stream import select_rows
from trl_stare.trainers.stage_ppo_metrics import explained_variance

logger = logging.getLogger("gradient_signal")

FIRST_SEED = 600_000
"""Beyond all seeds that recipes train, compare or evaluate on."""
ROWS = 1024
"""Decisions of one backward pass."""
SETTINGS = Path(__file__).with_name("gradient_signal.yaml")


class Replay(StagePPOTrainer):
    """A trainer whose iterations are rollouts that were played before."""

    def __init__(self, rollouts: Callable[[int], list[Trajectory]], *args: Any, **kwargs: Any):
        self.rollouts = rollouts
        super().__init__(*args, **kwargs)

    def collect_rollout(self, iteration: int) -> list[Trajectory]:
        """The stored rollout of this iteration."""
        return self.rollouts(iteration)


class Rollouts:
    """Batches of episodes of one checkpoint, on disk; each is played when it is first asked for."""

    def __init__(self, args: argparse.Namespace, policy: TokenPolicy, env: Any):
        self.args, self.policy, self.env, self.plan = args, policy, env, get_plan(args.task)
        self._loaded: dict[int, list[Trajectory]] = {}

    def __call__(self, index: int) -> list[Trajectory]:
        """The episodes of a batch, with the hidden states that a critic may read and a folder does not keep."""
        if index not in self._loaded:
            folder = self.args.output_dir / "rollouts" / f"{index}"
            if not folder.exists():
                self._play(index, folder)
            self._loaded[index] = [self._with_features(t) for t in load_trajectories(folder)]
        return self._loaded[index]

    def _play(self, index: int, folder: Path) -> None:
        first = FIRST_SEED + index * self.args.episodes
        seeds, generator = list(range(first, first + self.args.episodes)), torch.Generator().manual_seed(first)
        with tqdm(total=len(seeds), desc=f"batch {index}", unit="episode") as bar:
            played = play(
                self.env, self.policy, seeds, temperature=self.args.temperature, generator=generator,
                on_episode=lambda _: bar.update(),
            )  # fmt: skip
        part = folder.with_suffix(".part")
        save_trajectories(played, part, self.plan)
        part.rename(folder)

    @torch.no_grad()
    def _with_features(self, trajectory: Trajectory) -> Trajectory:
        inputs = self.policy.prepare(observations([trajectory]))
        evaluation = self.policy.evaluate(inputs, trajectory.trace, temperature=self.args.temperature)
        return replace(trajectory, features=evaluation.features)


def measure(
    settings: Mapping[str, Any], args: argparse.Namespace, rollouts: Rollouts, folder: Path
) -> dict[str, Tensor]:
    """`gradients` `[B, D]`, one of each batch after the warm-up, and `explained` `[B]`, the critic's explained variance in each."""
    policy = TokenPolicy.from_pretrained(args.checkpoint)
    set_seed(0)  # of the critic's first weights
    fixed = {"num_train_epochs": args.warmup, "value_warmup_iterations": args.warmup, "temperature": args.temperature}
    fixed |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 12}
    config = StagePPOConfig.preset("small-cpu", str(folder), **fixed | settings)
    trainer = Replay(rollouts, policy, config, rollouts.env, rollouts.plan, Dataset.from_dict({"seed": [0]}))
    trainer.train()
    trainer.model.eval()
    found: dict[str, list[Tensor]] = {"gradients": [], "explained": []}
    for index in range(args.warmup, args.warmup + args.batches):
        batch = trainer.make_batch(rollouts(index))
        found["gradients"].append(policy_gradient(trainer, batch))
        found["explained"].append(torch.tensor(explained_variance(batch["values"], batch["returns"])))
    return {name: torch.stack(rows) for name, rows in found.items()}


def policy_gradient(trainer: StagePPOTrainer, batch: Mapping[str, Any]) -> Tensor:
    """`[D]`, of all weights of the policy: where PPO's policy loss over the whole batch falls fastest, before any update."""
    weights = [weight for weight in trainer.policy.model.parameters() if weight.requires_grad]
    downhill = torch.zeros(sum(weight.numel() for weight in weights))
    for rows in torch.arange(len(batch["trace"])).split(ROWS):
        part = select_rows(batch, rows)
        features = part["features"] if trainer.args.critic in SIMULATOR_CRITICS else None
        evaluation, values = trainer.model(part["inputs"], part["trace"], features, trainer.args.temperature)
        loss = ppo_terms(evaluation, values, part, trainer.args, action_dim=trainer.policy.action_dim).policy.loss
        share = part["mask"].sum() / batch["mask"].sum()  # the loss is a mean over tokens
        found = torch.autograd.grad(loss * share, weights, materialize_grads=True, allow_unused=True)
        downhill -= torch.cat([gradient.flatten() for gradient in found])
    return downhill


def between(a: Tensor, b: Tensor) -> Tensor:
    """Mean inner product of rows of `a` and `b` from different batches, `[B, D]` each; a scalar, unbiased."""
    products = a @ b.T
    return (products.sum() - products.diagonal().sum()) / (len(a) * (len(a) - 1))


def agreement(g: Tensor) -> Tensor:
    """Share of the squared length that is not chance. Example: two equal rows: 1; two at a right angle: 0."""
    return between(g, g) / g.square().sum(dim=1).mean().clamp(min=1e-24)


def gain(g: Tensor, reference: Tensor) -> Tensor:
    """Success per unit of length, to first order; a batch without a gradient gains nothing. Example: all rows `g = 2 r`: `|r|`."""
    return between(normalize(g), reference)


def jackknife(statistic: Callable[..., Tensor], *parts: Tensor) -> tuple[float, float]:
    """A statistic of batches and its standard error, each batch left out once (Efron, 1982)."""
    count = len(parts[0])
    keep = ~torch.eye(count, dtype=torch.bool)
    without = torch.stack([statistic(*(part[rows] for part in parts)) for rows in keep])
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return statistic(*parts).item(), error.item()


def compare(found: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What each setting's gradients `[B, D]` are worth: the first is the reference, the second what gains are compared with."""
    reference, plain = (found[name] for name in list(found)[:2])
    return {
        name: {
            "agreement": jackknife(agreement, g),
            "gain": jackknife(gain, g, reference),
            "more": jackknife(lambda a, b, r: gain(a, r) - gain(b, r), g, plain, reference),
        }
        for name, g in found.items()
    }


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table a reader sees; standard errors behind +-."""
    reference, plain = list(results)[:2]
    rows = []
    for name, row in results.items():
        gained, more = ([1000 * value for value in row[key]] for key in ("gain", "more"))
        compared = "-" if name == plain else "{:+.2f} +- {:.2f}".format(*more)
        agree, gained = "{:.3f} +- {:.3f}".format(*row["agreement"]), "{:.2f} +- {:.2f}".format(*gained)
        rows.append((name, f"{100 * row['explained']:.0f} %", agree, gained, compared))
    table = markdown_table(("", "critic explains", "agreement", "gain, x 1000", f"more than {plain}"), rows)
    return f"{table}\n\n`{reference}` is the gradient that gains are measured along.\n"


def main(args: argparse.Namespace) -> None:
    """Play, differentiate, tell."""
    given = {name: str(getattr(args, name)) for name in ("checkpoint", "task", "episodes", "warmup", "temperature")}
    out = claim_folder(args.output_dir, given | {"batches": args.batches})
    policy, measured = TokenPolicy.from_pretrained(args.checkpoint), {}
    with closing(
        make_env(args.task, args.num_envs, chunk_size=policy.chunk_size, image_size=policy.image_size)
    ) as env:
        rollouts = Rollouts(args, policy, env)
        for name, settings in yaml.safe_load(args.config.read_text()).items():
            folder = claim_folder(out / "settings" / name, {"settings": settings})
            if not (folder / "measured.safetensors").exists():
                save_file(measure(settings, args, rollouts, folder), folder / "measured.part")
                (folder / "measured.part").rename(folder / "measured.safetensors")  # there whole or not at all
            measured[name] = load_file(folder / "measured.safetensors")
            logger.info("%s: the critic explains %.0f %%", name, 100 * measured[name]["explained"].mean())
    results = compare({name: found["gradients"] for name, found in measured.items()})
    for name, found in measured.items():
        results[name]["explained"] = found["explained"].mean().item()
    (out / "results.json").write_text(json.dumps({"arguments": given, "settings": results}, indent=1) + "\n")
    (out / "results.md").write_text(markdown(results))
    logger.info("%s", markdown(results))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--task", default="StackCube-v1")
    parser.add_argument("--config", type=Path, default=SETTINGS, help="name -> fields of StagePPOConfig")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=256, help="of a batch")
    parser.add_argument("--batches", type=int, default=8, help="whose gradients are compared")
    parser.add_argument("--warmup", type=int, default=2, help="batches from which the critic learns before")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--num_envs", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.batches < 3 or arguments.warmup < 1:  # an error needs two batches that are left when one is out
        parser.error(
            f"`--batches` must be at least 3 and `--warmup` 1, got {arguments.batches} and {arguments.warmup}."
        )
    main(arguments)
