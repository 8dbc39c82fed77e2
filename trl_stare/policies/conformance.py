"""What every policy must hold, as a test class: inherit it, say how your policy is made, and run pytest.

Example (see docs/own_vla.md):

```python
import pytest
from trl_stare.policies.conformance import PolicyConformance


class TestMyPolicy(PolicyConformance):
    @pytest.fixture(scope="class")
    def policy(self):
        return MyPolicy.from_pretrained("path/to/checkpoint")
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_stare.interfaces import Observation, VLAPolicy, token_steps

_LONG, _SHORT = "put the carrot on the plate", "stack"


class PolicyConformance:
    """A pytest suite over the fixture `policy` (a [`~trl_stare.interfaces.VLAPolicy`] in float32), which the subclass defines.

    Attributes:
        image_size (`int`): pixels of the test images. state_size (`int` or `None`): `P`, where the policy reads proprioception.
        acts_in_tokens (`bool`): whether `logps` are log-probabilities of the entries of the trace; else they are log-densities of a
            continuous action, one per environment step and dimension, and the score is minus an error (a flow policy).
        images_stay_uint8 (`bool`): whether prepared images take a quarter of float32's memory.
        atol (`float`): largest difference of log-probabilities that count as equal.
        action_atol (`float`): largest change of an action by `decode(encode(action))`, in robot units.
    """

    image_size: int = 64
    state_size: int | None = None
    acts_in_tokens: bool = True
    images_stay_uint8: bool = True
    atol: float = 1e-5
    action_atol: float = 1e-5

    def make_obs(self, *instructions: str, seed: int = 0) -> Observation:
        """Random images (and state), one per instruction."""
        generator, n = torch.Generator().manual_seed(seed), len(instructions)
        size = (n, self.image_size, self.image_size, 3)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        state = None if self.state_size is None else torch.randn(n, self.state_size, generator=generator)
        return Observation(images, instructions, state)

    def load(self, policy: Any, folder: Path) -> Any:
        """The policy that `save_pretrained` wrote to `folder`."""
        return type(policy).from_pretrained(folder)

    def adapt(self, policy: Any) -> Any:
        """The model of `policy` under a fresh LoRA on all its linear layers."""
        from peft import LoraConfig, get_peft_model

        return get_peft_model(policy.model, LoraConfig(r=2, target_modules="all-linear"))

    def sample(self, policy: Any, obs: Observation, temperature: float = 1.0) -> tuple[dict[str, Tensor], Any]:
        """Inputs, and what the policy did."""
        inputs = policy.prepare(obs)
        return inputs, policy.act(inputs, temperature=temperature, generator=torch.Generator().manual_seed(0))

    def test_protocol_and_shapes(self, policy: Any) -> None:
        """All members are there; actions are `[N, C, A]` float32, the rest `[N, L]` and `[N, F]`, traces int64 and not negative."""
        assert isinstance(policy, VLAPolicy), "the members of VLAPolicy must all be there"
        size = getattr(policy, "image_size", None)
        assert size is None or isinstance(size, int) and size > 0, "image_size: pixels of a side"
        inputs, sample = self.sample(policy, self.make_obs(_LONG, _SHORT))
        assert all(len(value) == 2 and value.device.type == "cpu" for value in inputs.values()), "prepare: N rows, CPU"
        if self.images_stay_uint8:
            assert inputs["pixel_values"].dtype == torch.uint8, "prepare: images stay uint8"
        assert sample.actions.shape == (2, policy.chunk_size, policy.action_dim), sample.actions.shape
        assert sample.actions.dtype == sample.logps.dtype == torch.float32
        assert sample.trace.dtype == torch.int64 and (sample.trace >= 0).all(), "what datasets store"
        assert sample.trace.ndim == 2 and sample.trace.shape[1] % policy.chunk_size == 0, sample.trace.shape
        assert sample.features.ndim == 2 and torch.isfinite(sample.logps).all()
        if self.acts_in_tokens:
            assert sample.trace.shape == sample.logps.shape and (sample.logps <= 0).all()
        else:
            assert sample.logps.shape == (2, policy.chunk_size * policy.action_dim), sample.logps.shape
        assert policy.encode(sample.actions).shape == sample.trace.shape, (
            "demonstrations and rollouts share their shape"
        )

    def test_acting_and_evaluating_agree(self, policy: Any) -> None:
        """The log-probabilities of the rollout are those of training, also at another temperature."""
        for temperature in (1.0, 0.6):
            inputs, sample = self.sample(policy, self.make_obs(_LONG, _SHORT), temperature)
            evaluation = policy.evaluate(inputs, sample.trace, temperature=temperature)
            torch.testing.assert_close(evaluation.logps.detach().cpu(), sample.logps, atol=self.atol, rtol=0)
            torch.testing.assert_close(evaluation.features.detach().float().cpu(), sample.features, atol=1e-4, rtol=0)
            assert evaluation.entropies.shape == evaluation.logps.shape and torch.isfinite(evaluation.entropies).all()
            assert not self.acts_in_tokens or (evaluation.entropies >= 0).all()

    def test_acting_is_a_function_of_the_generator(self, policy: Any) -> None:
        """Equal generators give equal traces, greedy acting needs none."""
        obs = self.make_obs(_LONG, _SHORT)
        (inputs, first), (_, second) = self.sample(policy, obs), self.sample(policy, obs)
        assert torch.equal(first.trace, second.trace)
        greedy = [policy.act(inputs, temperature=0.0, generator=None).trace for _ in range(2)]
        assert torch.equal(*greedy)

    def test_actions_survive_encoding(self, policy: Any) -> None:
        """`decode(encode(a)) = a` for every action the policy can take, and `actions` of `act` are its decoded trace."""
        _, sample = self.sample(policy, self.make_obs(_LONG, _SHORT))
        torch.testing.assert_close(policy.decode(sample.trace), sample.actions)
        again = policy.decode(policy.encode(sample.actions))
        torch.testing.assert_close(again, sample.actions, atol=self.action_atol, rtol=0)

    @torch.no_grad()
    def test_a_padded_batch_is_its_rows_one_by_one(self, policy: Any) -> None:
        """Neither the neighbours nor the padding of a shorter instruction change a row."""
        obs = self.make_obs(_LONG, _SHORT)
        inputs, sample = self.sample(policy, obs)
        batch = policy.evaluate(inputs, sample.trace).logps
        for row in range(2):
            rows = slice(row, row + 1)
            state = None if obs.state is None else obs.state[rows]
            alone = policy.prepare(Observation(obs.images[rows], obs.instructions[rows], state))
            logps = policy.evaluate(alone, sample.trace[rows]).logps
            torch.testing.assert_close(logps, batch[rows], atol=self.atol, rtol=0)

    @torch.no_grad()
    def test_image_and_instruction_matter(self, policy: Any) -> None:
        """Another image, or another instruction, changes the log-probabilities by more than rounding."""
        obs = self.make_obs(_LONG)
        inputs, sample = self.sample(policy, obs)
        before = policy.evaluate(inputs, sample.trace).logps
        for other in (obs._replace(images=255 - obs.images), obs._replace(instructions=(_SHORT,))):
            after = policy.evaluate(policy.prepare(other), sample.trace).logps
            assert (after - before).abs().max() > 10 * self.atol, "a policy must read both image and instruction"

    @torch.no_grad()
    def test_score_is_a_likelihood_and_antisymmetric(self, policy: Any) -> None:
        """The score is the summed log-probability, or minus an error that is free of chance: the reference is scored elsewhere.

        Exchanging chosen and rejected negates a preference's margin.
        """
        inputs, sample = self.sample(policy, self.make_obs(_LONG, _LONG))
        score = policy.score(inputs, sample.trace)
        for temperature in (1.0, 0.6):
            scored = policy.score(inputs, sample.trace, temperature=temperature)
            logps = policy.evaluate(inputs, sample.trace, temperature=temperature).logps
            torch.testing.assert_close(scored, logps.sum(-1) if self.acts_in_tokens else score, atol=1e-4, rtol=0)
        assert torch.equal(score, policy.score(inputs, sample.trace)) and (score < 0).all()
        step = token_steps(sample.trace.shape[1], policy.chunk_size)
        masks = [(step == index).expand_as(sample.trace) for index in range(policy.chunk_size)]
        parts = [policy.score(inputs, sample.trace, mask=mask) for mask in masks]
        torch.testing.assert_close(torch.stack(parts).sum(0), score, atol=1e-3, rtol=1e-4)
        assert torch.stack(parts).abs().min() > 0, "score: the steps in `mask`, and no others"
        swapped = {name: value.flip(0) for name, value in inputs.items()}
        margin = -policy.score(swapped, sample.trace.flip(0)).diff()
        torch.testing.assert_close(margin, score.diff(), atol=1e-4, rtol=0)

    def test_imitation_loss_reads_mask_and_weight(self, policy: Any) -> None:
        """Rows of weight 0 and environment steps outside the mask have no influence; the others do."""
        inputs, sample = self.sample(policy, self.make_obs(_LONG, _SHORT))
        trace, mask = sample.trace, torch.ones_like(sample.trace, dtype=torch.bool)
        last = trace.shape[1] - (trace.shape[1] // policy.chunk_size if policy.chunk_size > 1 else 1)
        mask[:, last:] = False
        weight = torch.tensor([1.0, 0.0])

        def loss_of(trace: Tensor) -> Tensor:
            torch.manual_seed(0)  # a flow policy draws noise
            return policy.imitation_loss(inputs, trace, mask, weight)

        loss = loss_of(trace)
        changed = trace.clone()
        changed[:, last:] = trace[:, last:].flip(0)
        changed[1] = changed[1].flip(0)
        torch.testing.assert_close(loss_of(changed), loss)
        assert loss.ndim == 0 and loss.requires_grad and loss > 0
        assert not torch.equal(loss_of(trace.flip(0)), loss), "the loss must read the trace"

    def test_gradients_reach_the_adapter_and_the_features(self, policy: Any) -> None:
        """Of a LoRA the likelihood reaches every tower, and a value head on the features reaches it too; disabled it is the base."""
        inputs, sample = self.sample(policy, self.make_obs(_LONG))
        base, plain = policy.score(inputs, sample.trace).detach(), policy.model
        try:
            policy.model = self.adapt(policy)
            for loss in (policy.score, lambda *args: policy.evaluate(*args).features.square().sum()):
                policy.model.zero_grad()
                loss(inputs, sample.trace).sum().backward()
                reached = [p for p in policy.model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
                assert reached, "no gradient reached the adapter"
            with policy.model.disable_adapter():
                torch.testing.assert_close(policy.score(inputs, sample.trace).detach(), base)
        finally:
            if policy.model is not plain:
                policy.model.unload()
            policy.model = plain
            plain.zero_grad()
            plain.requires_grad_(True)

    @torch.no_grad()
    def test_saving_is_exact(self, policy: Any, tmp_path: Path) -> None:
        """What is saved and loaded prepares the same inputs, gives the same scores and decodes the same actions."""
        obs = self.make_obs(_LONG, _SHORT)
        inputs, sample = self.sample(policy, obs)
        policy.save_pretrained(tmp_path)
        loaded = self.load(policy, tmp_path)
        again = loaded.prepare(obs)
        assert inputs.keys() == again.keys() and all(torch.equal(inputs[name], again[name]) for name in inputs)
        torch.testing.assert_close(loaded.score(again, sample.trace), policy.score(inputs, sample.trace))
        torch.testing.assert_close(loaded.decode(sample.trace), sample.actions)

    @torch.no_grad()
    def test_an_adapter_is_saved_exactly(self, policy: Any, tmp_path: Path) -> None:
        """A LoRA that has been trained comes back whole, on the base that it names."""
        base, folder, generator = tmp_path / "base", tmp_path / "adapter", torch.Generator().manual_seed(0)
        policy.save_pretrained(base)
        trained = self.load(policy, base)
        inputs, sample = self.sample(trained, self.make_obs(_LONG, _SHORT))
        before = trained.score(inputs, sample.trace)
        trained.model = self.adapt(trained)
        for parameter in trained.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        after = trained.score(inputs, sample.trace)
        trained.save_pretrained(folder)
        torch.testing.assert_close(self.load(policy, folder).score(inputs, sample.trace), after)
        assert not torch.allclose(before, after), "the adapter must change the score"
