"""A trivial environment with two stages, a policy of a few thousand weights for it, and trainers and trajectories made of them."""

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from trl_stare.data import Trajectory
from trl_stare.interfaces import EpisodeStart, Observation, Start, Step, VoidEpisode
from trl_stare.policies import TokenPolicy
from trl_stare.stages import Stage, StagePlan
from trl_stare.stages.measures import succeeded
from trl_stare.trainers import StagePPOConfig, StagePPOTrainer

STATS = {"toy": {"action": {"scale": [1.0]}, "state": {"mean": [0.0], "std": [1.0]}}}
PLAN = StagePlan(
    "toy",
    (
        Stage(name="Near", done=lambda s: s["distance"][..., 0] < 0.6, distance=lambda s: s["distance"][..., 0],
              scale=1.0, reads=("distance",)),
        Stage(name="Hit", done=succeeded, distance=lambda s: s["distance"][..., 0], scale=1.0, reads=("distance", "success")),
    ),
)  # fmt: skip


class ToyEnv:
    """A point at x = +-1 must come within 0.3 of 0 in six steps; an action moves it by at most 0.5."""

    task, instruction, max_episode_steps, signal_names = "toy", "go to the middle", 6, ("distance", "success")
    metadata: dict[str, Any] = {}

    def __init__(self, num_envs: int = 8, chunk_size: int = 1):
        self.num_envs, self.chunk_size = num_envs, chunk_size

    def reset(self, starts, *, ignore_terminations: bool = False) -> Start:
        self.starts = [start if isinstance(start, EpisodeStart) else EpisodeStart(int(start)) for start in starts]
        self.ignore = ignore_terminations
        self.queue, self.episode = list(range(len(self.starts))), torch.full((self.num_envs,), -1)
        self.x, self.time = torch.zeros(self.num_envs), torch.zeros(self.num_envs, dtype=torch.int64)
        for row in range(self.num_envs):
            self._begin(row)
        return Start(self._obs(), self._signals(), self.episode.clone())

    def _begin(self, row: int) -> None:
        self.episode[row] = self.queue.pop(0) if self.queue else -1
        start = self.starts[self.episode[row]] if self.episode[row] >= 0 else EpisodeStart(0)
        before = torch.zeros(0, 1) if start.actions is None else start.actions
        self.x[row] = 1.0 if start.seed % 2 else -1.0
        for action in before:
            self.x[row] += 0.5 * action[0].clamp(-1, 1)
        self.time[row] = len(before)

    def _obs(self) -> Observation:
        images = torch.zeros(self.num_envs, 16, 16, 3, dtype=torch.uint8)
        return Observation(images, (self.instruction,) * self.num_envs, self.x[:, None].clone())

    def _signals(self) -> dict[str, Tensor]:
        return {"distance": self.x.abs()[:, None].clone(), "success": self.x.abs() < 0.3}

    def step(self, actions: Tensor) -> Step:
        alive = self.episode >= 0
        rows, reward, taken = (
            [],
            torch.zeros(self.num_envs, self.chunk_size),
            torch.zeros(self.num_envs, dtype=torch.int64),
        )
        terminated, truncated = torch.zeros_like(alive), torch.zeros_like(alive)
        for c in range(self.chunk_size):
            self.x = torch.where(alive, self.x + 0.5 * actions[:, c, 0].clamp(-1, 1), self.x)
            self.time, taken = self.time + alive, taken + alive
            signals = self._signals()
            reward[:, c] = (signals["success"] & alive).float()
            rows.append(signals)
            terminated |= signals["success"] & alive & (not self.ignore)
            truncated |= alive & ~terminated & (self.time >= self.max_episode_steps)
            alive = alive & ~terminated & ~truncated
        chunk = {name: torch.stack([row[name] for row in rows], dim=1) for name in self.signal_names}
        final_obs, final = self._obs(), self._signals()
        for row in torch.nonzero(terminated | truncated).flatten().tolist():
            self._begin(row)
        return Step(self._obs(), self._signals(), self.episode.clone(), chunk, reward, taken, terminated, truncated,
                    final_obs, final)  # fmt: skip

    def close(self) -> None:
        """Nothing to end."""


def make_policy(chunk_size: int = 1) -> TokenPolicy:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return TokenPolicy.create_tiny(
        STATS, image_size=16, chunk_size=chunk_size, action_dim=1, num_bins=5, state_size=1, conv_channels=[8, 8, 8],
        readout_channels=4, text_config=text | {"intermediate_size": 32},
    )  # fmt: skip


def make_trainer(
    folder, chunk_size: int = 1, policy: TokenPolicy | None = None, eval_seeds: list[int] | None = None, **config
) -> StagePPOTrainer:
    options = {
        "num_train_epochs": 2, "episodes_per_iteration": 16, "num_minibatches": 2, "num_ppo_epochs": 2, "use_cpu": True,
        "learning_rate": 3e-3, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 4,
    }  # fmt: skip
    args = StagePPOConfig(str(folder), **(options | config))
    starts = Dataset.from_dict({"seed": list(range(999))})
    held_out = None if eval_seeds is None else Dataset.from_dict({"seed": eval_seeds})
    return StagePPOTrainer(
        policy or make_policy(chunk_size), args, ToyEnv(chunk_size=chunk_size), PLAN, starts, held_out
    )


def make_trajectory(
    rewards: list[float], starts: list[int], terminated: bool, signals: dict[str, Tensor] | None = None, **fields
) -> Trajectory:
    """`len(rewards)` steps from distance 1 to 0, or with the given signals."""
    steps = len(rewards)
    solved = torch.zeros(steps + 1, dtype=torch.bool)
    solved[-1] = terminated
    given = (
        {"distance": torch.linspace(1.0, 0.0, steps + 1)[:, None], "success": solved} if signals is None else signals
    )
    plain = Trajectory(
        task="toy", instruction="", seed=0, policy="", images=torch.zeros(len(starts), 1, 1, 3), starts=torch.tensor(starts),
        state=torch.zeros(len(starts), 1), actions=torch.zeros(steps, 1), labels=torch.zeros(steps, 1), trace=None,
        logps=None, features=None, final_image=torch.zeros(1, 1, 3), final_state=torch.zeros(1),
        signals=given, reward=torch.tensor(rewards), terminated=terminated, truncated=not terminated,
    )  # fmt: skip
    return replace(plain, **fields)


class SpoiledEnv(ToyEnv):
    """Every episode of some seeds ends with a value that is not finite."""

    def __init__(self, *seeds: int, num_envs: int = 2):
        super().__init__(num_envs)
        self.seeds, self.played = seeds, []

    def step(self, actions):
        playing, step = self.episode.clone(), super().step(actions)
        rows = torch.nonzero(step.terminated | step.truncated).flatten().tolist()
        self.played += [self.starts[playing[row]].seed for row in rows]
        rows = [row for row in rows if self.starts[playing[row]].seed in self.seeds]
        step.terminated[rows], step.truncated[rows] = False, False
        return step._replace(voided=tuple(VoidEpisode(int(playing[row]), 2, "state", row) for row in rows))


def make_approach(distances: list[float], success: bool, seed: int = 1) -> Trajectory:
    """One decision a step, through the given distances; of `PLAN` Near ends below 0.6, Hit with success."""
    steps = len(distances) - 1
    solved = torch.zeros(steps + 1, dtype=torch.bool)
    solved[-1] = success
    signals = {"distance": torch.tensor(distances)[:, None], "success": solved}
    return make_trajectory([0.0] * (steps - 1) + [float(success)], list(range(steps)), success, signals, seed=seed)


def logged(trainer: StagePPOTrainer, name: str) -> list[float]:
    """All values of one metric, in the order they were logged."""
    return [log[name] for log in trainer.state.log_history if name in log]
