import math

import pytest
import torch
from torch.nn import functional as F

from trl_stare.losses import (
    PREFERENCE_LOSSES,
    centered_scores,
    gae,
    margin_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reference_kl,
    stage_preference_loss,
)


def column(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).unsqueeze(-1)


def brute_force_gae(reward, value, next_value, terminated, ended, gamma, lam):
    """The definition: a sum over the rest of the episode, each TD error weighted by the discounts on the way to it."""
    advantages = torch.zeros_like(reward)
    steps, envs = reward.shape
    for n in range(envs):
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                bootstrap = 0.0 if terminated[k, n] else gamma[k, n] * next_value[k, n]
                advantages[t, n] += weight * (reward[k, n] + bootstrap - value[k, n])
                if ended[k, n]:
                    break
                weight = weight * gamma[k, n] * lam
    return advantages


class TestGae:
    # rewards, values, next values, terminated, ended -> advantages, with gamma 0.5 and lam 0.5
    TABLE = [
        ([0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0, 1], [0, 1], [0.25, 1.0]),
        ([0.0, 1.0], [0.0, 0.0], [0.0, 8.0], [0, 1], [0, 1], [0.25, 1.0]),  # terminated: no bootstrap
        ([0.0, 1.0], [0.0, 0.0], [0.0, 8.0], [0, 0], [0, 1], [1.25, 5.0]),  # truncated: bootstrap
        ([0.0, 1.0], [0.0, 0.0], [0.0, 8.0], [0, 0], [0, 0], [1.25, 5.0]),  # rollout cut off
        ([0.0, 1.0], [0.0, 0.0], [4.0, 0.0], [0, 1], [1, 1], [2.0, 1.0]),  # cut between the rows
        ([0.0, 1.0], [2.0, 1.0], [1.0, 0.0], [0, 1], [0, 1], [-1.5, 0.0]),
    ]

    @pytest.mark.parametrize(("reward", "value", "next_value", "terminated", "ended", "expected"), TABLE)
    def test_literal_values(self, reward, value, next_value, terminated, ended, expected):
        flags = column(terminated, torch.bool), column(ended, torch.bool)
        advantages, returns = gae(column(reward), column(value), column(next_value), *flags, gamma=0.5, lam=0.5)
        assert advantages.squeeze(-1).tolist() == expected
        assert torch.equal(returns, advantages + column(value))

    @pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
    def test_equals_brute_force(self, lam):
        generator = torch.Generator().manual_seed(0)
        reward, value, next_value = torch.randn(3, 30, 4, generator=generator, dtype=torch.float64)
        terminated = torch.rand(30, 4, generator=generator) < 0.1
        ended = terminated | (torch.rand(30, 4, generator=generator) < 0.1)
        gamma = (0.9 ** torch.randint(1, 5, (30, 4), generator=generator)).double()
        advantages, _ = gae(reward, value, next_value, terminated, ended, gamma=gamma, lam=lam)
        expected = brute_force_gae(reward, value, next_value, terminated, ended, gamma, lam)
        torch.testing.assert_close(advantages, expected)

    def test_lam_one_returns_are_discounted_sums(self):
        reward = column([1.0, 2.0, 4.0])
        value = column([0.3, -0.2, 0.9])
        next_value = torch.cat([value[1:], torch.zeros(1, 1)])
        terminated = column([0, 0, 1], torch.bool)
        _, returns = gae(reward, value, next_value, terminated, terminated, gamma=0.5, lam=1.0)
        torch.testing.assert_close(returns, column([1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0]))

    def test_constant_gamma_equals_a_tensor_of_it(self):
        generator = torch.Generator().manual_seed(1)
        reward, value, next_value = torch.randn(3, 8, 2, generator=generator)
        never = torch.zeros(8, 2, dtype=torch.bool)
        with_float = gae(reward, value, next_value, never, never, gamma=0.9, lam=0.8)
        with_tensor = gae(reward, value, next_value, never, never, gamma=torch.full((8, 2), 0.9), lam=0.8)
        torch.testing.assert_close(with_float, with_tensor)

    @pytest.mark.parametrize("name", ["value", "next_value", "terminated", "ended", "gamma"])
    def test_refuses_to_broadcast(self, name):
        never = torch.zeros(4, 2, dtype=torch.bool)
        arguments = {"value": torch.ones(4, 2), "next_value": torch.ones(4, 2), "terminated": never, "ended": never}
        arguments |= {"gamma": torch.ones(4, 2)}
        arguments[name] = arguments[name][:, :1]
        with pytest.raises(ValueError, match=rf"`{name}` must have shape \[4, 2\], got \[4, 1\]"):
            gae(torch.zeros(4, 2), lam=0.9, **arguments)

    def test_refuses_impossible_flags(self):
        zeros, never = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)
        with pytest.raises(ValueError, match="`ended` must be true wherever"):
            gae(zeros, zeros, zeros, ~never, never, gamma=0.9, lam=0.9)
        with pytest.raises(ValueError, match="`terminated` must be bool"):
            gae(zeros, zeros, zeros, zeros, never, gamma=0.9, lam=0.9)


class TestPolicyLoss:
    ALL = torch.ones(1, 4, dtype=torch.bool)

    # log-ratios of 4 tokens (2 actions of 2), advantage, level -> loss and clipfrac, clip range 0.2
    TABLE = [
        ("token", [0.0, 0.0, 0.0, 0.0], 3.0, -3.0, 0.0),
        ("token", [math.log(2)] * 4, 1.0, -1.2, 1.0),
        ("token", [math.log(2)] * 4, -1.0, 2.0, 1.0),  # the pessimistic side is not clipped
        ("token", [math.log(0.5)] * 4, -1.0, 0.8, 1.0),
        ("token", [math.log(1.1), math.log(2), 0.0, math.log(0.9)], 1.0, -(1.1 + 1.2 + 1.0 + 0.9) / 4, 0.25),
        ("action", [math.log(1.1), math.log(1.05), math.log(2), math.log(0.5)], 1.0, -(1.155 + 1.0) / 2, 0.0),
        ("chunk", [math.log(2), math.log(2), math.log(0.5), math.log(0.55)], 1.0, -1.1, 0.0),
    ]

    @pytest.mark.parametrize(("level", "log_ratio", "advantage", "loss", "clipfrac"), TABLE)
    def test_literal_values(self, level, log_ratio, advantage, loss, clipfrac):
        old = torch.full((1, 4), -1.5, dtype=torch.float64)
        result = ppo_policy_loss(
            old + torch.tensor([log_ratio], dtype=torch.float64),
            old,
            torch.tensor([advantage], dtype=torch.float64),
            self.ALL,
            clip_range=0.2,
            level=level,
            action_dim=2,
        )
        assert result.loss.item() == pytest.approx(loss)
        assert result.clipfrac.item() == pytest.approx(clipfrac)

    def test_kl_closed_form(self):
        logps = torch.tensor([[math.log(2.0), 0.0]])
        result = ppo_policy_loss(
            logps, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool), clip_range=0.2
        )
        assert result.approx_kl.item() == pytest.approx((2 - 1 - math.log(2)) / 2)

    @pytest.mark.parametrize("level", ["token", "action", "chunk"])
    def test_on_policy_gradient_is_reinforce(self, level):
        generator = torch.Generator().manual_seed(0)
        old, advantages = torch.randn(5, 6, generator=generator), torch.randn(5, generator=generator)
        logps = old.clone().requires_grad_()
        mask = torch.ones(5, 6, dtype=torch.bool)
        ppo_policy_loss(logps, old, advantages, mask, clip_range=0.2, level=level, action_dim=3).loss.backward()
        units = {"token": 30, "action": 10, "chunk": 5}[level]
        torch.testing.assert_close(logps.grad, -advantages[:, None].expand(5, 6) / units)

    @pytest.mark.parametrize("level", ["token", "action", "chunk"])
    def test_masked_tokens_play_no_part(self, level):
        generator = torch.Generator().manual_seed(0)
        old, advantages = torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)
        logps = (old + 0.1 * torch.randn(3, 4, generator=generator)).requires_grad_()
        # the last action of the second decision was cut off by the episode's end; the third was never executed
        mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
        poisoned = old.masked_fill(~mask, -math.inf)
        options = {"clip_range": 0.2, "level": level, "action_dim": 2}
        result = ppo_policy_loss(logps, poisoned, advantages, mask, **options)
        result.loss.backward()
        assert (logps.grad[~mask] == 0).all()
        assert (logps.grad[mask] != 0).any()

        whole = ppo_policy_loss(logps[:1], old[:1], advantages[:1], mask[:1], **options)
        part = ppo_policy_loss(logps[1:2, :2], old[1:2, :2], advantages[1:2], mask[1:2, :2], **options)
        units = {"token": (4, 2), "action": (2, 1), "chunk": (1, 1)}[level]
        expected = (units[0] * whole.loss + units[1] * part.loss) / sum(units)
        torch.testing.assert_close(result.loss, expected)

    def test_refusals(self):
        logps, mask = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
        advantages = torch.zeros(2)
        with pytest.raises(ValueError, match=r"`advantages` must have shape \[2\], got \[2, 1\]"):
            ppo_policy_loss(logps, logps, torch.zeros(2, 1), mask, clip_range=0.2)
        with pytest.raises(ValueError, match=r"`old_logps` must have shape \[2, 4\], got \[2, 1\]"):
            ppo_policy_loss(logps, torch.zeros(2, 1), advantages, mask, clip_range=0.2)
        with pytest.raises(ValueError, match="`mask` must be bool"):
            ppo_policy_loss(logps, logps, advantages, mask.float(), clip_range=0.2)
        with pytest.raises(ValueError, match="`mask` must keep at least one"):
            ppo_policy_loss(logps, logps, advantages, ~mask, clip_range=0.2)
        with pytest.raises(ValueError, match=r"`level` must be one of \('token', 'action', 'chunk'\), got 'step'"):
            ppo_policy_loss(logps, logps, advantages, mask, clip_range=0.2, level="step")
        for action_dim in (None, 3, 0):
            with pytest.raises(ValueError, match="`action_dim` must divide"):
                ppo_policy_loss(logps, logps, advantages, mask, clip_range=0.2, level="action", action_dim=action_dim)
        with pytest.raises(ValueError, match="`clip_range` must be positive"):
            ppo_policy_loss(logps, logps, advantages, mask, clip_range=0.0)


class TestValueLoss:
    # value, old value, return, clip range, huber delta -> loss
    TABLE = [
        (1.0, 0.0, 3.0, None, None, 2.0),
        (1.0, 0.0, 3.0, 0.5, None, 3.125),  # max(2, 0.5 * 2.5^2): the clipped value is further off
        (1.0, 0.0, -1.0, 0.5, None, 2.0),  # max(2, 1.125): clipping never makes the loss smaller
        (1.0, 0.0, 3.0, None, 1.0, 1.5),  # 1 * (2 - 0.5)
        (1.0, 0.0, 3.0, 0.5, 1.0, 2.0),  # 1 * (2.5 - 0.5)
        (1.0, 0.9, 1.5, 0.5, 1.0, 0.125),
    ]

    @pytest.mark.parametrize(("value", "old", "target", "clip_range", "huber_delta", "expected"), TABLE)
    def test_literal_values(self, value, old, target, clip_range, huber_delta, expected):
        tensors = [torch.tensor([x]) for x in (value, old, target)]
        assert ppo_value_loss(*tensors, clip_range=clip_range, huber_delta=huber_delta).item() == pytest.approx(
            expected
        )

    def test_mean_over_the_batch(self):
        zero = torch.zeros(2)
        assert ppo_value_loss(torch.tensor([2.0, 0.0]), zero, zero, clip_range=None, huber_delta=None).item() == 1.0

    def test_refuses_to_broadcast(self):
        with pytest.raises(ValueError, match=r"`values` must have shape \[3\], got \[3, 1\]"):
            ppo_value_loss(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3), clip_range=None, huber_delta=None)


class TestReferenceKL:
    def test_literal_values_of_unmasked_tokens(self):
        logps = torch.tensor([[-2.0, -1.0, -1.0]])
        ref = logps + torch.tensor([[math.log(2), 0.0, 50.0]])
        kl = reference_kl(logps, ref, torch.tensor([[True, True, False]]))
        assert kl.item() == pytest.approx((1 - math.log(2)) / 2)

    def test_its_mean_over_samples_is_the_kl(self):
        """k3 is unbiased: weighted with the new probabilities it is KL(new | reference) itself."""
        new, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
        tokens = [reference_kl(n.log().view(1, 1), r.log().view(1, 1), torch.ones(1, 1, dtype=torch.bool))
                  for n, r in zip(new, ref, strict=True)]  # fmt: skip
        expected = (new * (new / ref).log()).sum()
        torch.testing.assert_close((new * torch.stack(tokens)).sum(), expected)

    def test_at_the_reference_it_is_zero_and_flat(self):
        logps = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        kl = reference_kl(logps, logps.detach(), torch.ones(3, 4, dtype=torch.bool))
        kl.backward()
        assert kl.item() == 0.0 and (logps.grad == 0).all()

    def test_refusals(self):
        zeros, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"`ref_logps` must have shape \[2, 3\], got \[2, 1\]"):
            reference_kl(zeros, zeros[:, :1], mask)
        with pytest.raises(ValueError, match="`mask` must keep at least one"):
            reference_kl(zeros, zeros, ~mask)


class TestStagePreferenceLoss:
    @staticmethod
    def draw(num_pairs=7, seed=0):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(4, num_pairs, generator=generator, dtype=torch.float64)
        costs = torch.rand(2, num_pairs, generator=generator, dtype=torch.float64)
        return [*scores, *costs]

    @pytest.mark.parametrize(("margin_sign", "logit"), [(1, 1.1), (-1, 0.9)])
    def test_literal_values(self, margin_sign, logit):
        inputs = [torch.tensor([x]) for x in (2.0, 1.0, 0.0, 0.0, 0.5, 1.5)]
        losses, logits = stage_preference_loss(*inputs, beta=1.0, cost_coef=0.1, margin_sign=margin_sign)
        assert logits.item() == pytest.approx(logit)
        assert losses.item() == pytest.approx(math.log(1 + math.exp(-logit)))

    @pytest.mark.parametrize("margin_sign", [1, -1])
    def test_swapping_negates_the_logit(self, margin_sign):
        chosen, rejected, ref_chosen, ref_rejected, cost, other_cost = self.draw()
        options = {"beta": 0.7, "cost_coef": 0.3, "margin_sign": margin_sign}
        _, logits = stage_preference_loss(chosen, rejected, ref_chosen, ref_rejected, cost, other_cost, **options)
        _, swapped = stage_preference_loss(rejected, chosen, ref_rejected, ref_chosen, other_cost, cost, **options)
        torch.testing.assert_close(swapped, -logits)

    def test_without_cost_it_is_dpo(self):
        chosen, rejected, ref_chosen, ref_rejected, *costs = self.draw()
        losses, _ = stage_preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, *costs, beta=0.1, cost_coef=0.0, margin_sign=-1
        )
        dpo = -F.logsigmoid(0.1 * ((chosen - rejected) - (ref_chosen - ref_rejected)))
        torch.testing.assert_close(losses, dpo)

    def test_equal_costs_change_nothing(self):
        *scores, cost, _ = self.draw()
        with_cost = stage_preference_loss(*scores, cost, cost, beta=0.5, cost_coef=2.0)
        without = stage_preference_loss(*scores, cost, cost, beta=0.5, cost_coef=0.0)
        torch.testing.assert_close(with_cost, without)

    def test_at_the_reference_the_loss_is_log_two(self):
        chosen, rejected, _, _, cost, _ = self.draw()
        losses, logits = stage_preference_loss(chosen, rejected, chosen, rejected, cost, cost, beta=1.0, cost_coef=0.1)
        assert (logits == 0).all()
        torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))

    def test_the_stated_sign_pushes_clear_pairs_less_and_odpo_more(self):
        gradients = {}
        for sign in (1, -1):
            chosen = torch.zeros(2, requires_grad=True)
            zero, costs = torch.zeros(2), (torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
            options = {"beta": 1.0, "cost_coef": 1.0, "margin_sign": sign}
            losses, _ = stage_preference_loss(chosen, zero, zero, zero, *costs, **options)
            losses.sum().backward()
            gradients[sign] = chosen.grad.abs()
        assert gradients[1][1] < gradients[1][0]
        assert gradients[-1][1] > gradients[-1][0]

    def test_gradient_closed_form(self):
        chosen, rejected, *rest = self.draw()
        chosen.requires_grad_(), rejected.requires_grad_()
        losses, logits = stage_preference_loss(chosen, rejected, *rest, beta=0.7, cost_coef=0.3)
        losses.sum().backward()
        torch.testing.assert_close(chosen.grad, -0.7 * torch.sigmoid(-logits).detach())
        torch.testing.assert_close(rejected.grad, -chosen.grad)

    def test_weights_multiply_the_losses_and_leave_the_logits(self):
        inputs, weights = self.draw(), torch.arange(7).double()
        losses, logits = stage_preference_loss(*inputs, beta=1.0, cost_coef=0.1, weights=weights)
        plain, plain_logits = stage_preference_loss(*inputs, beta=1.0, cost_coef=0.1)
        torch.testing.assert_close(losses, weights * plain)
        assert torch.equal(logits, plain_logits)

    def test_refusals(self):
        inputs = self.draw(3)
        with pytest.raises(ValueError, match=r"`rejected_costs` must have shape \[3\], got \[1\]"):
            stage_preference_loss(*inputs[:5], inputs[5][:1], beta=1.0, cost_coef=0.1)
        with pytest.raises(ValueError, match=r"`weights` must have shape \[3\], got \[1\]"):
            stage_preference_loss(*inputs, beta=1.0, cost_coef=0.1, weights=torch.ones(1))
        options = {"beta": 1.0, "cost_coef": 0.1, "margin_sign": 1}
        for name, value in [("beta", 0.0), ("beta", math.nan), ("cost_coef", -0.1), ("margin_sign", 0)]:
            with pytest.raises(ValueError, match=f"`{name}` must be"):
                stage_preference_loss(*inputs, **(options | {name: value}))


class TestCenteredScores:
    def test_literal_values(self):
        policy, reference = (torch.tensor(p).log().expand(2, 1, 2) for p in ([0.8, 0.2], [0.5, 0.5]))
        scores = centered_scores(policy, reference, torch.tensor([[0], [1]]))
        torch.testing.assert_close(scores - math.log(0.5), torch.tensor([0.693147, -0.693147]))

    def test_the_mean_over_the_references_actions_is_zero_in_every_state(self):
        """All 3 x 3 actions of two tokens, each with its probability; the plain log-ratio's mean is minus the KL."""
        g = torch.Generator().manual_seed(0)
        logps, ref = (torch.randn(1, 2, 3, generator=g).double().log_softmax(-1).expand(9, 2, 3) for _ in range(2))
        actions = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        ref_logps = ref.gather(-1, actions[..., None]).sum((1, 2))
        assert (ref_logps.exp() * (centered_scores(logps, ref, actions) - ref_logps)).sum().abs() < 1e-12
        assert (ref_logps.exp() * (logps.gather(-1, actions[..., None]).sum((1, 2)) - ref_logps)).sum() < -0.1

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match=r"`ref_logps` must have shape \[4, 2, 3\]"):
            centered_scores(torch.zeros(4, 2, 3), torch.zeros(1, 2, 3), torch.zeros(4, 2).long())

    def test_of_some_tokens_they_are_those_of_these_alone(self):
        logps, ref_logps = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
        trace, mask = torch.arange(20).view(5, 4) % 3, torch.tensor([True, False, True, False]).expand(5, 4)
        some = (values[:, ::2] for values in (logps, ref_logps, trace))
        torch.testing.assert_close(centered_scores(logps, ref_logps, trace, mask), centered_scores(*some))


class TestMarginLoss:
    # loss, beta, label_smoothing, margin -> value, by hand
    TABLE = [
        ("sigmoid", 1.0, 0.0, 0.0, math.log(2)),
        ("sigmoid", 2.0, 0.0, math.log(3) / 2, math.log(4 / 3)),
        ("hinge", 0.5, 0.0, 1.0, 0.5),
        ("hinge", 1.0, 0.0, 2.0, 0.0),
        ("hinge", 1.0, 0.0, -2.0, 3.0),
        ("ipo", 0.5, 0.0, 1.0, 0.0),
        ("ipo", 0.25, 0.0, 5.0, 9.0),
        ("robust", 1.0, 0.25, math.log(3), 1.5 * math.log(4 / 3) - 0.5 * math.log(4)),
        ("robust", 1.0, 0.0, math.log(3), math.log(4 / 3)),
    ]

    @pytest.mark.parametrize(("loss_type", "beta", "smoothing", "margin", "expected"), TABLE)
    def test_literal_values(self, loss_type, beta, smoothing, margin, expected):
        margins = torch.tensor([margin], dtype=torch.float64)
        loss = margin_loss(margins, beta=beta, loss_type=loss_type, label_smoothing=smoothing)
        assert loss.item() == pytest.approx(expected, abs=1e-12)

    def test_robust_is_unbiased_under_flipped_labels(self):
        """Chowdhury et al. 2024, lemma 3.1: with a share `e` of labels flipped its mean is the clean sigmoid loss."""
        margins, e = torch.linspace(-3, 3, 13, dtype=torch.float64), 0.2
        there, flipped = (margin_loss(m, beta=0.7, loss_type="robust", label_smoothing=e) for m in (margins, -margins))
        torch.testing.assert_close((1 - e) * there + e * flipped, margin_loss(margins, beta=0.7))

    @pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
    def test_a_pair_that_is_wrong_costs_more(self, loss_type):
        wrong, right = margin_loss(torch.tensor([-0.3, 0.3]), beta=1.0, loss_type=loss_type)
        assert wrong > right

    @pytest.mark.parametrize("loss_type", PREFERENCE_LOSSES)
    def test_the_stage_loss_is_this_of_its_margin(self, loss_type):
        inputs = TestStagePreferenceLoss.draw()
        losses, logits = stage_preference_loss(*inputs, beta=0.5, cost_coef=0.3, loss_type=loss_type)
        torch.testing.assert_close(losses, margin_loss(logits / 0.5, beta=0.5, loss_type=loss_type))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"loss_type": "apo_zero"}, "`loss_type` must be one of .* got 'apo_zero'"),
            ({"label_smoothing": 0.1}, "`label_smoothing` must be .* except for 'robust', got 0.1"),
            ({"loss_type": "robust", "label_smoothing": 0.5}, "`label_smoothing`"),
            ({"loss_type": "robust", "label_smoothing": -0.1}, "`label_smoothing`"),
            ({"beta": math.nan}, "`beta`"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(ValueError, match=message):
            margin_loss(torch.zeros(2), **({"beta": 1.0} | options))
