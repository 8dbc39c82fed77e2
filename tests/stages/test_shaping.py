import pytest
import torch

from trl_stare.losses import gae
from trl_stare.stages import shaped_reward

NEVER = torch.zeros(6, dtype=torch.bool)


def test_literal_values():
    reward = torch.tensor([0.0, 1.0, 1.0])
    potential, next_potential = torch.tensor([0.25, 0.5, 0.5]), torch.tensor([0.5, 1.0, 1.0])
    # going on; truncated (the potential stays); terminated (nothing follows)
    terminated = torch.tensor([False, False, True])
    shaped = shaped_reward(reward, potential, next_potential, gamma=0.9, weight=2.0, terminated=terminated)
    torch.testing.assert_close(shaped, torch.tensor([0.4, 1.8, 0.0]))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_telescopes(gamma):
    potentials = torch.tensor([0.1, 0.3, 0.2, 0.7, 0.5, 0.9, 0.8], dtype=torch.float64)
    zero = torch.zeros(6, dtype=torch.float64)
    shaping = shaped_reward(zero, potentials[:-1], potentials[1:], gamma=gamma, weight=1.0, terminated=NEVER)
    total = (gamma ** torch.arange(6) * shaping).sum()
    torch.testing.assert_close(total, gamma**6 * potentials[-1] - potentials[0])


def test_shaping_telescopes_to_minus_the_first_potential_at_a_termination():
    potentials = torch.tensor([0.1, 0.3, 0.2, 0.7, 0.5, 0.9, 1.0], dtype=torch.float64)
    terminated = torch.arange(6) == 5
    zero = torch.zeros(6, dtype=torch.float64)
    shaping = shaped_reward(zero, potentials[:-1], potentials[1:], gamma=0.9, weight=1.0, terminated=terminated)
    torch.testing.assert_close((0.9 ** torch.arange(6) * shaping).sum(), -potentials[0])


def test_advantages_are_unchanged_when_values_give_way_to_the_potential():
    """With `V' = V - Phi` and w = 1 every TD error is the same, so GAE is, over terminations and truncations."""
    generator = torch.Generator().manual_seed(0)
    reward, value, next_value, potential, next_potential = torch.rand(5, 20, 3, generator=generator).double()
    terminated = torch.rand(20, 3, generator=generator) < 0.1
    ended = terminated | (torch.rand(20, 3, generator=generator) < 0.1)
    gamma = 0.9 ** torch.randint(1, 5, (20, 3), generator=generator)
    shaped = shaped_reward(reward, potential, next_potential, gamma=gamma, weight=1.0, terminated=terminated)
    plain = gae(reward, value, next_value, terminated, ended, gamma=gamma, lam=0.95)[0]
    moved = gae(shaped, value - potential, next_value - next_potential, terminated, ended, gamma=gamma, lam=0.95)[0]
    torch.testing.assert_close(moved, plain)


def test_weight_zero_gives_the_reward_back():
    reward = torch.rand(6)
    shaped = shaped_reward(reward, torch.rand(6), torch.rand(6), gamma=0.9, weight=0.0, terminated=NEVER)
    assert torch.equal(shaped, reward)


@pytest.mark.parametrize("name", ["potential", "next_potential", "terminated", "gamma"])
def test_refuses_to_broadcast(name):
    arguments = {
        "potential": torch.ones(6),
        "next_potential": torch.ones(6),
        "terminated": NEVER,
        "gamma": torch.ones(6),
    }
    arguments[name] = arguments[name][:1]
    with pytest.raises(ValueError, match=rf"`{name}` must have the shape of `reward`, \[6\], got \[1\]"):
        shaped_reward(torch.zeros(6), weight=1.0, **arguments)


def test_refuses_float_flags():
    with pytest.raises(ValueError, match="`terminated` must be bool"):
        shaped_reward(torch.zeros(6), torch.ones(6), torch.ones(6), gamma=1.0, weight=1.0, terminated=torch.zeros(6))
