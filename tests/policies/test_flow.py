"""pi0 as a policy: the sampler in closed form, the chain in a trace, LeRobot's names, statistics, bad input."""

import importlib.util
import json
import math

import pytest
import torch
from flow_toy import make_flow, statistics
from safetensors.torch import load_file, save_file

from trl_stare import FlowPolicy, TokenPolicy
from trl_stare.interfaces import Observation
from trl_stare.policies import load_lerobot_policy
from trl_stare.policies.flow import FlowSettings, lerobot_name
from trl_stare.policies.flow.policy import hold
from trl_stare.policies.flow.sde import gaussian_entropy, gaussian_logps, noisy_actions, ode_step, sde_step
from trl_stare.policies.flow.trace import FlowTrace, pack, unpack
from trl_stare.policies.lerobot.configuration import LeRobotFlowConfig


def observe(n=2, size=28, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=g)
    return Observation(images, ("stack the cube",) * n, torch.randn(n, 8, generator=g))


def act(policy, obs, temperature=1.0, seed=0):
    inputs = policy.prepare(obs)
    return inputs, policy.act(inputs, temperature=temperature, generator=torch.Generator().manual_seed(seed))


def test_an_sde_step_by_hand():
    x, v, index = torch.ones(2, 1, 1), torch.tensor([0.0, 2.0])[:, None, None], torch.tensor([1, 0])
    mean, std = sde_step(x, v, index, num_steps=2, noise_level=1.0)
    # row 0: t = 1/2, sigma^2 = 1; row 1: t = 1, sigma^2 = 1 / (1 - 1/2) = 2, mean 1 - 1/2 * 2 - 1/2 * 2/2 * 1
    assert mean.flatten().tolist() == pytest.approx([0.5, -0.5])
    assert std.flatten().tolist() == pytest.approx([math.sqrt(0.5), 1.0])


def test_without_noise_it_is_the_ode():
    x, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    mean, std = sde_step(x, v, torch.tensor([0, 3, 7]), num_steps=8, noise_level=0.0)
    torch.testing.assert_close(mean, ode_step(x, v, 8))
    assert (std == 0).all()


def test_every_step_stochastic_keeps_the_distribution_of_the_actions():
    """Actions from N(m, s^2) have the velocity E[noise - action | x_t] in closed form; the SDE must end at N(m, s^2) too."""
    m, s, steps, n = 0.7, 0.3, 200, 20000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 1, generator=generator)
    for step in range(steps):
        t = 1 - step / steps
        spread = t**2 + (1 - t) ** 2 * s**2
        error = x - (1 - t) * m
        velocity = (t - (1 - t) * s**2) / spread * error - m
        mean, std = sde_step(x, velocity, torch.full((n,), step), num_steps=steps, noise_level=0.5)
        x = mean + std * torch.randn(n, 1, 1, generator=generator)
    assert float(x.mean()) == pytest.approx(m, abs=0.02)
    assert float(x.std()) == pytest.approx(s, abs=0.02)


def test_density_entropy_and_noisy_actions():
    normal = torch.distributions.Normal(torch.tensor(0.3), torch.tensor(0.2))
    value = torch.tensor([0.1, 0.9])
    torch.testing.assert_close(gaussian_logps(value, normal.mean, normal.stddev), normal.log_prob(value))
    torch.testing.assert_close(gaussian_entropy(normal.stddev), normal.entropy())
    assert noisy_actions(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 2.0), torch.tensor([0.25])).item() == 0.5


def test_steps_that_do_not_count_repeat_the_last_one_that_does():
    actions = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[..., None]
    kept = torch.tensor([[True, True, False], [True, False, False]])
    assert hold(actions, kept)[..., 0].tolist() == [[1.0, 2.0, 2.0], [4.0, 4.0, 4.0]]


def test_a_trace_is_exact():
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, 1e-40, 3.4e38, -1e-30, math.pi])
    chain = FlowTrace(
        values[:4].view(1, 2, 2), values.flip(0)[:6].view(1, 2, 3), values[4:].view(1, 2, 2), torch.tensor([3])
    )
    packed = pack(chain)
    assert packed.shape == (1, 2 * 8) and (packed >= 0).all()
    assert packed[0, 7] == packed[0, 15] == 4
    assert pack(chain._replace(actions=torch.ones(1, 2, 2)))[0, 0] == 0x3F800000
    for part, again in zip(chain, unpack(packed, chunk_size=2, action_dim=2, latent_dim=3), strict=True):
        assert torch.equal(part, again)
    with pytest.raises(ValueError, match=r"`trace` must be `\[N, 16\]`"):
        unpack(packed[:, :-1], chunk_size=2, action_dim=2, latent_dim=3)


def test_one_step_of_a_decision_is_stochastic():
    """From the recorded latents the other steps can be done again without any chance."""
    policy = make_flow(num_inference_steps=3)
    inputs, sample = act(policy, observe(8))
    chain = policy._unpack(sample.trace)
    assert set(chain.index.tolist()) == {0, 1, 2}
    # the last step of a chain leads to its action
    last = chain.index == 2
    torch.testing.assert_close(chain.after[last], chain.actions[last])
    # and without that step's noise, it is transformers' own sampler
    noise = torch.zeros(8, 4, 8)
    pixels = inputs["pixel_values"].float() / 127.5 - 1
    native = policy.model.sample_actions(**inputs | {"pixel_values": pixels}, noise=noise)
    greedy = policy.act(inputs, temperature=0.0, generator=None)
    torch.testing.assert_close(policy._unpack(greedy.trace).actions, native[..., :7], atol=1e-4, rtol=1e-4)


def test_a_chain_of_one_step():
    policy = make_flow(num_inference_steps=1)
    inputs, sample = act(policy, observe())
    torch.testing.assert_close(policy.evaluate(inputs, sample.trace).logps.detach(), sample.logps, atol=1e-5, rtol=0)


def test_bfloat16():
    policy = make_flow(spread=1.0)
    policy.model.to(torch.bfloat16)
    inputs, sample = act(policy, observe())
    assert sample.logps.dtype == sample.actions.dtype == torch.float32
    torch.testing.assert_close(policy.evaluate(inputs, sample.trace).logps.detach(), sample.logps, atol=0.05, rtol=0)


def test_demonstrations_have_no_chain():
    policy = make_flow()
    inputs = policy.prepare(observe())
    with pytest.raises(ValueError, match="got a demonstration, which has no chain"):
        policy.evaluate(inputs, policy.encode(torch.zeros(2, 4, 7)))


def test_the_score_is_flow_dpos_error_at_shared_noise_and_times():
    policy = make_flow()
    inputs = policy.prepare(observe())
    trace = policy.encode(torch.rand(2, 4, 7) * 2 - 1)
    actions = torch.nn.functional.pad(policy._unpack(trace).actions, (0, 1))
    noises = torch.randn(4, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    pixels = inputs["pixel_values"].float() / 127.5 - 1
    policy.model.config.loss_reduction = "none"
    losses = [
        policy.model(
            **inputs | {"pixel_values": pixels},
            noise=noise.expand_as(actions),
            timestep=torch.full((2,), time),
            actions=actions,
        ).loss[..., :7].sum((1, 2))
        for noise, time in zip(noises, (0.125, 0.375, 0.625, 0.875), strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(policy.score(inputs, trace), -0.5 * torch.stack(losses).mean(0), atol=1e-4, rtol=1e-5)


def test_preferences_are_learnt_by_the_score():
    policy, reference = make_flow(spread=1.0), make_flow(spread=1.0)
    inputs = policy.prepare(observe())
    chosen, rejected = (policy.encode(torch.full((2, 4, 7), value)) for value in (0.5, -0.5))
    with torch.no_grad():
        ref = reference.score(inputs, chosen) - reference.score(inputs, rejected)
    optimizer = torch.optim.AdamW(policy.model.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        margin = policy.score(inputs, chosen) - policy.score(inputs, rejected) - ref
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1] < 0.3, losses


def test_actions_stay_in_the_range_of_the_statistics():
    stats = {"toy": {"action": {"q01": [-0.2, 0.0], "q99": [0.2, 3.0], "mask": [True, False]}}}
    policy = make_flow(stats)
    values = torch.tensor([[[0.5, 5.0], [-3.0, -5.0], [1.0, 0.0], [0.0, 0.5]]])
    none = FlowTrace(values, torch.zeros(1, 4, 8), values, torch.tensor([-1]))
    expected = torch.tensor([[[0.1, 5.0], [-0.2, -5.0], [0.2, 0.0], [0.0, 0.5]]])
    torch.testing.assert_close(policy.decode(pack(none)), expected)


def test_any_policy_class_loads_it_with_its_settings(tmp_path):
    policy = make_flow(statistics(key="a"), flow={"noise_level": 0.3})
    policy.model.config.norm_stats["b"] = {"action": {"mean": [0.0] * 7, "std": [2.0] * 7}}
    policy.save_pretrained(tmp_path)
    loaded = TokenPolicy.from_pretrained(tmp_path, "b")
    assert type(loaded) is FlowPolicy and loaded.settings == FlowSettings(noise_level=0.3)
    torch.testing.assert_close(loaded.decode(loaded.encode(torch.full((1, 4, 7), 5.0))), torch.full((1, 4, 7), 5.0))
    with pytest.raises(ValueError, match=r"`unnorm_key` must be one of \['a', 'b'\], got 'c'"):
        TokenPolicy.from_pretrained(tmp_path, "c")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_lerobots_names_load(tmp_path, prefix):
    """A checkpoint under LeRobot's names: every tensor arrives, none is left as it was."""
    policy = make_flow(chunk_size=3)
    theirs = {}
    policy.model.save_pretrained(tmp_path / "ours")
    for name, value in load_file(tmp_path / "ours" / "model.safetensors").items():
        theirs[prefix + name] = torch.randn_like(value)
    assert any(name.startswith(f"{prefix}paligemma_with_expert.gemma_expert.lm_head") for name in theirs)
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"type": "pi0", "chunk_size": 3, "n_obs_steps": 1}))
    config = policy.model.config.to_dict()
    sizes = {name: config[name] for name in ("vlm_config", "dit_config", "max_state_dim", "max_action_dim")}
    given = {"tokenizer": policy.processor.tokenizer, "norm_stats": statistics()}
    loaded = load_lerobot_policy(folder, settings=sizes, **given)
    assert loaded.chunk_size == 3
    other = {"chunk_size": 5, "flow": {"noise_level": 0.25}}
    assert load_lerobot_policy(folder, settings=sizes | other, **given).chunk_size == 5
    ours = loaded.model.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[lerobot_name(canonical(name))], value, atol=0, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = FlowPolicy.from_pretrained(tmp_path / "again").model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in ours.items())


def canonical(name):
    """PaliGemma's language model gets an inner `model.` where transformers saves it."""
    return name.replace("language_model.model.", "language_model.")


def test_lerobots_other_models_say_where_they_run(tmp_path):
    cases = [
        (
            "act",
            ValueError,
            "must be a checkpoint that LeRobot wrote, one of .*'pi0', 'pi05', 'smolvla'.*got type 'act'",
        )
    ]
    if importlib.util.find_spec("lerobot") is None:  # where it is, tests/policies/test_lerobot.py
        cases += [(kind, ImportError, f"'{kind}' needs LeRobot.*python3.12 -m venv") for kind in ("smolvla", "pi05")]
    for kind, error, message in cases:
        (tmp_path / "config.json").write_text(json.dumps({"type": kind}))
        with pytest.raises(error, match=message):
            load_lerobot_policy(tmp_path, tokenizer=None, norm_stats={})
    with pytest.raises(ValueError, match="must be left out for 'smolvla'.*Use the trainer's `bf16`"):
        (tmp_path / "config.json").write_text(json.dumps({"type": "smolvla"}))
        load_lerobot_policy(tmp_path, tokenizer=None, norm_stats={}, dtype="bfloat16")
    with pytest.raises(ValueError, match="must be of LeRobot's pi0"):
        lerobot_name("model.vision_tower.weight")


def test_several_cameras_and_other_sizes():
    policy = make_flow()
    obs = observe()
    two = obs._replace(images=torch.stack([obs.images, 255 - obs.images], dim=1))
    inputs, sample = act(policy, two)
    assert inputs["pixel_values"].shape == (2, 2, 3, 28, 28) and inputs["pixel_attention_mask"].all()
    same = obs._replace(images=torch.stack([obs.images] * 2, dim=1))
    before, after = (policy.evaluate(policy.prepare(o), sample.trace).logps for o in (two, same))
    assert (before - after).abs().max() > 1e-4
    wide = policy.prepare(obs._replace(images=torch.full((2, 28, 56, 3), 200, dtype=torch.uint8)))["pixel_values"]
    # the proportions stay: black above and below
    assert wide.shape == (2, 1, 3, 28, 28) and (wide[..., :6, :] == 0).all() and (wide[..., 10:18, :] == 200).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, r"`obs.state` must be `\[N, 8\]`, got None"),
        ({"state": torch.zeros(2, 3)}, r"got \[2, 3\]"),
        ({"images": torch.zeros(2, 28, 28, 3)}, "`images` must be .* uint8, got torch.float32"),
        ({"images": torch.zeros(2, 28, 28, 4, dtype=torch.uint8)}, r"got torch.uint8 \[2, 1, 28, 28, 4\]"),
        ({"instructions": ("go " * 60,) * 2}, "fewer than 48 tokens, got"),
    ],
)
def test_bad_observations(change, message):
    policy = make_flow()
    with pytest.raises(ValueError, match=message):
        policy.prepare(observe()._replace(**change))


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({}, "must hold action statistics, got none"),
        (statistics(action_dim=9), r"\['action'\]` must hold at most 8 values, got 9"),
        ({"toy": {"action": {"mean": [0.0], "std": [-1.0]}}}, "`std` must be at least 0"),
        ({"toy": {"action": {"mean": [0.0], "std": [float("nan")]}}}, "`std` must be finite"),
    ],
)
def test_bad_statistics(stats, message):
    model, processor = make_flow().model, make_flow().processor
    model.config.norm_stats = stats
    with pytest.raises(ValueError, match=message):
        FlowPolicy(model, processor)


def test_bad_settings_and_gradient_checkpointing():
    with pytest.raises(ValueError, match="`noise_level` must be positive, got 0"):
        FlowSettings(noise_level=0.0)
    with pytest.raises(ValueError, match="`score_draws` must be at least 1, got 0"):
        FlowSettings(score_draws=0)
    policy = make_flow()
    inputs = policy.prepare(observe())
    policy.model.gradient_checkpointing_enable()
    policy.model.train()
    with pytest.raises(ValueError, match="`gradient_checkpointing` must be False for pi0"):
        policy.score(inputs, policy.encode(torch.zeros(2, 4, 7)))


@pytest.mark.parametrize(
    ("lerobot", "size"),
    [
        ({"type": "smolvla", "resize_imgs_with_padding": [512, 512]}, 512),
        ({"type": "smolvla", "resize_imgs_with_padding": None}, None),
        ({"type": "pi05", "image_resolution": [224, 224]}, 224),
    ],
)
def test_the_recipes_are_told_which_pictures_lerobots_networks_see(lerobot, size):
    assert LeRobotFlowConfig(lerobot).image_size == size
