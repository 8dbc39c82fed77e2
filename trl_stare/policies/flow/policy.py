"""A flow-matching VLA (pi0) behind the policy protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_stare.interfaces import ActionEval, ActionSample, Observation
from trl_stare.policies.conventions import get_convention
from trl_stare.policies.flow.denoiser import Prefix, read_prefix, velocity
from trl_stare.policies.flow.processing import FlowProcessor
from trl_stare.policies.flow.sde import gaussian_entropy, gaussian_logps, noisy_actions, ode_step, sde_step
from trl_stare.policies.flow.trace import FlowTrace, pack, unpack
from trl_stare.policies.normalization import ActionStatistics, select_statistics
from trl_stare.policies.pretrained import PretrainedPolicy


@dataclass(frozen=True)
class FlowSettings:
    """How a flow policy explores and is scored: `config.flow` of a checkpoint.

    Attributes:
        noise_level (`float`): `a` of [`sde_step`]; 0.5 in pi-RL.
        score_draws (`int`): times, and noises, at which a preference score is the mean error.
        score_seed (`int`): of those noises.
        action_convention (`str`): see [`get_convention`]; the statistics are those of the checkpoint's side.
    """

    noise_level: float = 0.5
    score_draws: int = 4
    score_seed: int = 0
    action_convention: str = "identity"

    def __post_init__(self):
        if not self.noise_level > 0:
            raise ValueError(f"`noise_level` must be positive, got {self.noise_level}.")
        if self.score_draws < 1:
            raise ValueError(f"`score_draws` must be at least 1, got {self.score_draws}.")


class FlowPolicy(PretrainedPolicy, model_type="pi0"):
    """A [`~trl_stare.interfaces.VLAPolicy`] over transformers' `PI0ForConditionalGeneration`.

    It acts by denoising. One step of the chain, drawn at random for every decision, is stochastic (Flow-SDE), the others are not:
    `logps` are the Gaussian log-densities of that step, one per environment step and action dimension, and [`evaluate`] takes a
    single forward of the action expert (pi-RL, arXiv 2510.25889). At temperature `T` the noise of that step is multiplied by `T`; at 0
    the chain starts from zeros and every step is deterministic.

    A `trace` is the packed chain ([`~trl_stare.policies.flow.trace`]). A preference compares errors of flow matching, [`score`].

    Args:
        model (`PI0ForConditionalGeneration`): its config holds `norm_stats`, `{key: {"action": ..., "state": ...}}`, both read as
            [`ActionStatistics`], and `flow`, the fields of [`FlowSettings`]. Without `"state"` no proprioception is read.
        processor ([`FlowProcessor`]): tokenizer and image size.
        unnorm_key (`str`, *optional*): which statistics to use; may be left out where the checkpoint has only one.

    Raises:
        ValueError: an unknown `unnorm_key`, or statistics that do not fit the model.

    Example:

    ```python
    >>> policy = FlowPolicy.from_pretrained("outputs/my_pi0")
    >>> policy.act(policy.prepare(obs), temperature=1.0).actions.shape
    torch.Size([1, 50, 7])
    ```
    """

    processor_class = FlowProcessor
    num_cameras = None

    def __init__(self, model: Any, processor: Any, unnorm_key: str | None = None):
        config = model.config
        norm_stats = getattr(config, "norm_stats", {})
        self.model, self.processor = model, processor
        self.unnorm_key = select_statistics(norm_stats, unnorm_key)
        self.settings = FlowSettings(**getattr(config, "flow", {}))
        self.convention = get_convention(self.settings.action_convention)
        self.statistics = ActionStatistics.of_checkpoint(norm_stats, self.unnorm_key)
        self.state_statistics = _state_statistics(norm_stats, self.unnorm_key)
        self.chunk_size, self.action_dim = config.chunk_size, self.statistics.action_dim
        for name, used in (("action", self.statistics), ("state", self.state_statistics)):
            largest = getattr(config, f"max_{name}_dim")
            if used is not None and used.action_dim > largest:
                raise ValueError(
                    f"`norm_stats[{self.unnorm_key!r}][{name!r}]` must hold at most {largest} values, got {used.action_dim}."
                )

    @property
    def image_size(self) -> int | None:
        """Pixels of a side of the pictures that the model reads, as the processor says; `None` if it does not."""
        return getattr(self.processor, "image_size", None)

    @property
    def state_size(self) -> int | None:
        """Values of proprioception that the statistics have; `None` where none is read."""
        return None if self.state_statistics is None else self.state_statistics.action_dim

    @property
    def latent_dim(self) -> int:
        """`D`: dimensions that are denoised; those past `action_dim` are padding, and are never executed."""
        return self.model.config.max_action_dim

    @property
    def num_features(self) -> int:
        """`F`: the prompt's hidden state and the proprioception, padded."""
        config = self.model.config
        return config.vlm_config.text_config.hidden_size + config.max_state_dim

    def prepare(self, obs: Observation) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` `[N, S]`, `pixel_values` `[N, cameras, 3, H, W]` uint8, `pixel_attention_mask`, `state` `[N, D]`.

        Raises:
            ValueError: no proprioception, or of another size, where the statistics have it.
        """
        images = obs.images if obs.images.ndim == 5 else obs.images[:, None]
        state = self._state(obs)
        state = F.pad(state, (0, self.model.config.max_state_dim - state.shape[-1]))
        return self.processor(images=images, text=obs.instructions) | {"state": state}

    @torch.no_grad()
    def act(
        self, inputs: dict[str, Tensor], *, temperature: float, generator: torch.Generator | None = None
    ) -> ActionSample:
        """Denoise one chunk per row. At temperature 0 `logps` are those of the deterministic step at temperature 1."""
        inputs = self._place(inputs)
        prefix = self._read(inputs)
        n, num_steps = len(inputs["state"]), self.model.config.num_inference_steps
        x = torch.zeros(n, self.chunk_size, self.latent_dim)
        noise, chosen = x[..., : self.action_dim], torch.zeros(n, dtype=torch.int64)
        if temperature:
            x = torch.randn(x.shape, generator=generator)
            chosen = torch.randint(num_steps, (n,), generator=generator)
            noise = torch.randn(noise.shape, generator=generator)
        x, noise, chosen = (value.to(self.device) for value in (x, noise, chosen))
        before, after, logps = x.clone(), noise.clone(), noise.clone()
        for step in range(num_steps):
            index = torch.full_like(chosen, step)
            v = self._velocity(inputs, prefix, x, 1 - index / num_steps)
            following = ode_step(x, v, num_steps)
            here = chosen == step
            mean, std = self._transition(x, v, index, temperature or 1.0)
            stepped = mean + std * noise if temperature else following[..., : self.action_dim]
            before[here], after[here] = x[here], stepped[here]
            logps[here] = gaussian_logps(stepped, mean, std)[here]
            x = following
            x[here, :, : self.action_dim] = stepped[here]
        trace = pack(FlowTrace(x[..., : self.action_dim], before, after, chosen)).cpu()
        return ActionSample(self.decode(trace), trace, logps.flatten(1).cpu(), prefix.features.cpu())

    def evaluate(self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float = 1.0) -> ActionEval:
        """`logps`, `entropies` `[N, C * A]` of the chains' stochastic steps; differentiable.

        The entropies are differential, and no function of the weights: the noise is a setting.

        Raises:
            ValueError: a trace without a chain, such as a demonstration's.
        """
        inputs = self._place(inputs)
        chain = self._unpack(trace.to(self.device))
        if (chain.index < 0).any():
            raise ValueError("`trace` must be of this policy's rollouts, got a demonstration, which has no chain.")
        prefix = self._read(inputs)
        time = 1 - chain.index / self.model.config.num_inference_steps
        v = self._velocity(inputs, prefix, chain.before, time)
        mean, std = self._transition(chain.before, v, chain.index, temperature)
        entropies = gaussian_entropy(std).expand_as(mean)
        return ActionEval(gaussian_logps(chain.after, mean, std).flatten(1), entropies.flatten(1), prefix.features)

    def score(
        self, inputs: dict[str, Tensor], trace: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        """`[N]`: `-1/2 * |v(x_t, t) - (noise - action)|^2` over the chunk, the mean over the settings' times and noises; differentiable.

        Of the chunk those environment steps count whose record is in `mask` `[N, L]`, by default all.

        Differences of it are the logit of Flow-DPO (arXiv 2501.13918) with a constant beta. Times and noises are the same for policy
        and reference, chosen and rejected, and for every decision: equal weights have equal scores, and the margin no noise of
        its own. Times are the midpoints of equal intervals. `temperature` changes nothing: the errors know no sampling.
        """
        inputs, actions = self._place(inputs), self._latent(trace)
        prefix = self._read(inputs)
        draws = self.settings.score_draws
        generator = torch.Generator().manual_seed(self.settings.score_seed)
        noises = torch.randn(draws, 1, self.chunk_size, self.latent_dim, generator=generator).to(self.device)
        kept = torch.ones_like(trace) if mask is None else mask
        kept = kept.to(self.device).unflatten(1, (self.chunk_size, -1)).all(-1)[..., None]
        error = actions.new_zeros(len(actions))
        for draw, noise in enumerate(noises):
            time = actions.new_full((len(actions),), (draw + 0.5) / draws)
            errors = self._errors(inputs, prefix, actions, noise.expand_as(actions), time)
            error = error + (errors * kept).sum((1, 2))
        return -0.5 * error / draws

    def imitation_loss(
        self, inputs: dict[str, Tensor], trace: Tensor, mask: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Scalar: flow matching at one random time and noise per row (from torch's global generator), as pi0 was trained.

        Args:
            mask (`Tensor`): `[N, L]` bool; an environment step counts where all of its record does. weight (`Tensor`): `[N]`.
        """
        inputs, actions = self._place(inputs), self._latent(trace)
        kept = mask.to(self.device).unflatten(1, (self.chunk_size, -1)).all(-1)
        # the steps of a chunk attend to each other: one that does not count must not be seen either
        actions = hold(actions, kept)
        time = self._training_times(len(actions)).to(self.device)
        noise = torch.randn(actions.shape).to(self.device)
        errors = self._errors(inputs, self._read(inputs), actions, noise, time).mean(-1)
        losses = (errors * kept).sum(-1) / kept.sum(-1).clamp(min=1)
        if weight is None:
            return losses.mean()
        return (losses * weight.to(losses)).mean()

    def encode(self, actions: Tensor) -> Tensor:
        """`[N, C, A]` robot units -> `[N, L]` trace without a chain."""
        if self.convention is not None:
            actions = self.convention.from_robot(actions)
        values = self.statistics.normalize(actions).float()
        none = torch.full((len(values),), -1)
        return pack(FlowTrace(values, torch.zeros(*values.shape[:2], self.latent_dim), torch.zeros_like(values), none))

    def decode(self, trace: Tensor) -> Tensor:
        """`[N, L]` trace -> `[N, C, A]` float32 robot units, within the range that quantiles or bounds give."""
        values = self._unpack(trace.cpu()).actions
        if self.statistics.kind != "normal":
            # as a token policy, whose bins end there
            values = torch.where(self.statistics.mask, values.clamp(-1, 1), values)
        actions = self.statistics.unnormalize(values).float()
        return actions if self.convention is None else self.convention.to_robot(actions)

    def _state(self, obs: Observation) -> Tensor:
        """`[N, P]` float32, normalised; `P` is 0 where the policy reads no proprioception.

        Raises:
            ValueError: none, or of another size, where the statistics have it.
        """
        if self.state_statistics is None:
            return torch.zeros(len(obs.images), 0)
        size = self.state_statistics.action_dim
        if obs.state is None or obs.state.shape[-1] != size:
            got = None if obs.state is None else [*obs.state.shape]
            raise ValueError(f"`obs.state` must be `[N, {size}]`, got {got}. This policy needs proprioception.")
        return self.state_statistics.normalize(obs.state).float()

    def _read(self, inputs: dict[str, Tensor]) -> Prefix:
        return read_prefix(self.model, inputs)

    def _velocity(self, inputs: dict[str, Tensor], prefix: Prefix, x: Tensor, time: Tensor) -> Tensor:
        return velocity(self.model, inputs, prefix, x, time)

    def _unpack(self, trace: Tensor) -> FlowTrace:
        sizes = {"chunk_size": self.chunk_size, "action_dim": self.action_dim, "latent_dim": self.latent_dim}
        return unpack(trace, **sizes)

    def _place(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in inputs.items()}

    def _latent(self, trace: Tensor) -> Tensor:
        """`[N, C, D]`, the actions of `trace`; padding is 0, as in pi0's training."""
        return F.pad(self._unpack(trace.to(self.device)).actions, (0, self.latent_dim - self.action_dim))

    def _transition(self, x: Tensor, v: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Mean `[N, C, A]` and std `[N, 1, 1]` of the stochastic step, in the dimensions that act."""
        steps = self.model.config.num_inference_steps
        x, v = x[..., : self.action_dim], v[..., : self.action_dim]
        return sde_step(x, v, index, num_steps=steps, noise_level=self.settings.noise_level * temperature)

    def _errors(
        self, inputs: dict[str, Tensor], prefix: Prefix, actions: Tensor, noise: Tensor, time: Tensor
    ) -> Tensor:
        """`[N, C, A]`: squared errors of the velocity at `time` `[N]` between `actions` and `noise` `[N, C, D]`."""
        v = self._velocity(inputs, prefix, noisy_actions(actions, noise, time), time)
        return (v - (noise - actions))[..., : self.action_dim].square()

    def _training_times(self, n: int) -> Tensor:
        """`[N]`: pi0's own distribution, which favours noisy times (arXiv 2410.24164, appendix B)."""
        config = self.model.config
        beta = torch.distributions.Beta(config.time_sampling_beta_alpha, config.time_sampling_beta_beta)
        return beta.sample((n,)) * config.time_sampling_scale + config.time_sampling_offset


def hold(actions: Tensor, kept: Tensor) -> Tensor:
    """`[N, C, D]`: steps that are not `kept` `[N, C]` repeat the last one that is, or the first step where none was yet.

    Example: actions 1, 2, 3 of which the last is not kept become 1, 2, 2.
    """
    steps = torch.arange(kept.shape[1], device=kept.device) * kept
    return actions.gather(1, steps.cummax(dim=1).values[..., None].expand_as(actions))


def _state_statistics(norm_stats: Mapping[str, Any], key: str) -> ActionStatistics | None:
    """Of the proprioception, typed and checked as actions are; `None` where the checkpoint has none."""
    stats = norm_stats[key].get("state")
    return None if stats is None else ActionStatistics.of_checkpoint({f"{key}: state": {"action": stats}})
