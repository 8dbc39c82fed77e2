"""The vocabulary of the package: records that flow between simulator, policy and trainer, and the two protocols.

Shapes: `N` environments, `D` values of a signal, `H x W` pixels, `P` proprioceptive values, `C` environment steps in an
action chunk, `A` action dimensions, `L` action tokens of one decision (`C * A` for a token policy), `F` features.

A *decision* is one call of the policy: it looks once and commits to a chunk of `C` environment steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Signals = Mapping[str, Tensor]
"""Privileged simulator state by name. At one moment `[N]` bool or `[N, D]` float32; along a trajectory `[T]` or `[T, D]`."""


ADAPTER_CONFIG_NAME = "policy_config.json"
"""The model's config beside an adapter: its statistics and conventions need not be the base's. Were it called `config.json`,
transformers would look for the whole model there."""


ACTION_DIM = 7
"""Values of one action of a simulated task: translation, rotation, gripper. A policy for another robot may have others."""


NOMINAL = "nominal"
"""What the `metadata` of a [`VectorEnv`] and results say of a task that was played as it is, without a variation."""


def token_steps(num_tokens: int, chunk_size: int) -> Tensor:
    """`[L]` int64: which environment step of its chunk each entry of a trace belongs to.

    Args:
        num_tokens (`int`): `L`. chunk_size (`int`): `C`.

    Raises:
        ValueError: if the steps cannot have equally many entries.

    Example: `token_steps(6, 3)` is `[0, 0, 1, 1, 2, 2]`.
    """
    if num_tokens % chunk_size:
        raise ValueError(f"`num_tokens` must be a multiple of the {chunk_size} steps of a chunk, got {num_tokens}.")
    return torch.arange(chunk_size).repeat_interleave(num_tokens // chunk_size)


class Observation(NamedTuple):
    """What a policy may see.

    Attributes:
        images (`Tensor`): `[N, H, W, 3]` uint8, RGB; `[N, cameras, H, W, 3]` for a policy that asks for several.
        instructions (`tuple[str, ...]`): `N` instructions.
        state (`Tensor` or `None`): `[N, P]` float32 proprioception, in metres, unit quaternions (wxyz) and radians.
    """

    images: Tensor
    instructions: tuple[str, ...]
    state: Tensor | None


class EpisodeStart(NamedTuple):
    """Where an episode begins: at a seed's initial state, or some steps later.

    A simulator's state cannot be stored and restored exactly, but the same seed and actions lead to the same state.

    Attributes:
        seed (`int`): names the initial state, at least 0.
        actions (`Tensor` or `None`): `[P, A]` robot units, executed without rendering before the policy first looks. The time
            limit counts them too.

    Example: `EpisodeStart(7, trajectory.actions[:25])` begins where `trajectory`, of seed 7, was after 25 steps.
    """

    seed: int
    actions: Tensor | None = None


class VoidEpisode(NamedTuple):
    """An episode that ended because the simulator gave a value that is not finite. Nothing of it can be used.

    Attributes:
        episode (`int`): index into the starts given to `reset`.
        step (`int`): after how many environment steps, those of its [`EpisodeStart`] included.
        what (`str`): the value, e.g. `"signals['object_position']"`.
        env (`int`): row of the environments that was playing it.
    """

    episode: int
    step: int
    what: str
    env: int = 0


class Work(NamedTuple):
    """Seconds that the average worker was busy with a [`Start`] or [`Step`].

    Attributes:
        simulate_s (`float`): physics, signals, scenes built anew. render_s (`float`): pictures.
    """

    simulate_s: float = 0.0
    render_s: float = 0.0


class Start(NamedTuple):
    """What [`VectorEnv.reset`] returns: the first moment of `N` episodes.

    Attributes:
        obs (`Observation`): first observations.
        signals (`Signals`): name -> `[N]` or `[N, D]`, at `obs`.
        episode (`Tensor`): `[N]` int64, index into the starts given to `reset`; -1 where there was none left.
        voided (`tuple[VoidEpisode, ...]`): episodes that could not begin; others took their place.
        work (`Work`): what it took.
    """

    obs: Observation
    signals: Signals
    episode: Tensor
    voided: tuple[VoidEpisode, ...] = ()
    work: Work = Work()


class Step(NamedTuple):
    """The result of one decision. Where an episode ended, the next start's episode has already begun in `obs`.

    Attributes:
        obs (`Observation`): what the policy looks at next.
        signals (`Signals`): name -> `[N]` or `[N, D]`, at `obs`.
        episode (`Tensor`): `[N]` int64, which of `reset`'s starts `obs` belongs to; -1 where none is left.
        chunk_signals (`Signals`): name -> `[N, C]` or `[N, C, D]`, after each environment step of the chunk; rows past
            `num_steps` repeat the last one.
        reward (`Tensor`): `[N, C]` float32, the task's own sparse reward of each environment step, 0 past `num_steps`.
        num_steps (`Tensor`): `[N]` int64, environment steps executed; less than `C` where the episode ended, 0 for idle rows
            and where it was voided.
        terminated (`Tensor`): `[N]` bool, the task itself ended the episode (success).
        truncated (`Tensor`): `[N]` bool, the time limit did. Never both.
        final_obs (`Observation`): last observation of the episode that ended; equals `obs` in the other rows.
        final_signals (`Signals`): name -> `[N]` or `[N, D]`, at `final_obs`.
        voided (`tuple[VoidEpisode, ...]`): episodes that ended without a result; all other values are finite.
        work (`Work`): what the decision took.
    """

    obs: Observation
    signals: Signals
    episode: Tensor
    chunk_signals: Signals
    reward: Tensor
    num_steps: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: Observation
    final_signals: Signals
    voided: tuple[VoidEpisode, ...] = ()
    work: Work = Work()


class ActionSample(NamedTuple):
    """What a policy did, and what is needed to score it again.

    Attributes:
        actions (`Tensor`): `[N, C, A]` float32, robot units (what the controller takes).
        trace (`Tensor`): `[N, L]` int64 >= 0, the action as the policy sampled it: bin indices of a token policy. A flow policy's is
            longer than its `logps`, `C` records of the denoising chain.
        logps (`Tensor`): `[N, L]` float32, log-probabilities under the sampling distribution, temperature included; of a flow
            policy log-densities, `L = C * A`.
        features (`Tensor`): `[N, F]` float32, the hidden state a value head may read.
    """

    actions: Tensor
    trace: Tensor
    logps: Tensor
    features: Tensor


class ActionEval(NamedTuple):
    """A differentiable second look at sampled actions.

    Attributes:
        logps (`Tensor`): `[N, L]`; equals [`ActionSample`]'s at equal weights and temperature.
        entropies (`Tensor`): `[N, L]`, nats; differential ones, which may be negative, of a flow policy.
        features (`Tensor`): `[N, F]`.
    """

    logps: Tensor
    entropies: Tensor
    features: Tensor


@runtime_checkable
class VLAPolicy(Protocol):
    """A vision-language-action policy, as every trainer and the evaluation see it.

    Attributes:
        model (`torch.nn.Module`): the trainable module (a `PreTrainedModel`, maybe wrapped by PEFT, DDP or DeepSpeed).
        processor (`ProcessorMixin`): saved beside the model.
        chunk_size (`int`): `C`. action_dim (`int`): `A`.
        num_features (`int`, *optional*): `F`, where it is not the language model's hidden size.
        image_size (`int`, *optional*): pixels of a side of the pictures that it reads; recipes take the task's own where it does not
            say.
        num_cameras (`int` or `None`, *optional*): what it looks through, by default one; `None` for any number. state_size (`int`,
            *optional*): values of proprioception that it reads.
    """

    model: torch.nn.Module
    processor: Any
    chunk_size: int
    action_dim: int

    def prepare(self, obs: Observation) -> dict[str, Tensor]:
        """Turn observations into model inputs with first dimension `N`: pure, on the CPU, images still uint8."""

    def act(self, inputs: dict[str, Tensor], *, temperature: float, generator: torch.Generator | None) -> ActionSample:
        """Sample one chunk per row, without gradients. `temperature` 0 is greedy."""

    def evaluate(self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float = 1.0) -> ActionEval:
        """Score `trace` again, differentiably."""

    def score(
        self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        """`[N]`: what a preference loss compares, a function of weights and arguments alone.

        The log-likelihood of the chunk sampled at `temperature` > 0, or minus the error of flow matching at fixed noises
        and times, which no temperature changes. Only the entries of `trace` in `mask` `[N, L]` count, by default all.
        """

    def imitation_loss(
        self, inputs: dict[str, Tensor], trace: Tensor, mask: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Scalar, differentiable: how badly the entries of `trace` in `mask` `[N, L]` are imitated.

        Mean over rows, each times its `weight` `[N]`, whose mean over the dataset is 1.
        """

    def encode(self, actions: Tensor) -> Tensor:
        """`[N, C, A]` robot units -> `[N, L]` trace."""

    def decode(self, trace: Tensor) -> Tensor:
        """`[N, L]` trace -> `[N, C, A]` robot units."""

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        """Write model and processor to `folder`."""


class VectorEnv(Protocol):
    """`num_envs` environments of one task that play a list of episodes, each from its start.

    Attributes:
        num_envs (`int`): `N`. task (`str`): registered task name. instruction (`str`).
        max_episode_steps (`int`): the time limit in environment steps. signal_names (`tuple[str, ...]`).
        metadata (`dict`): what a result must record: backend, visuals, image size, variation, versions.
    """

    num_envs: int
    task: str
    instruction: str
    max_episode_steps: int
    signal_names: tuple[str, ...]
    metadata: dict[str, Any]

    def reset(self, starts: Sequence[int | EpisodeStart], *, ignore_terminations: bool = False) -> Start:
        """Begin the episodes of `starts`. Any number of them: finished environments take the next one by themselves.

        An `int` is the start of that seed, without actions. With `ignore_terminations` an episode goes on to its time limit
        after a success (evaluation: success at end).
        """

    def step(self, actions: Tensor) -> Step:
        """Execute `[N, C, A]` robot-unit action chunks. Rows of idle environments are ignored."""

    def close(self) -> None:
        """End the simulators."""


class VectorEnvPart(VectorEnv, Protocol):
    """Some of the rows of a [`VectorEnv`], which can be stepped while something else is done.

    A `VectorEnv` may have an attribute `parts`, a tuple of these: its rows in their order. After a `reset` of the whole they
    play on independently of each other, and a rollout lets the policy act on one part while the others simulate. Without
    `parts` an environment is played in one piece.
    """

    def step_async(self, actions: Tensor) -> None:
        """Begin a decision: `[N, C, A]` robot-unit action chunks."""

    def step_wait(self) -> Step:
        """The result of the decision that [`step_async`] began."""
