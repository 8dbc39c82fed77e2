"""Statistics, bins and conventions, against values by hand and against transforms3d."""

import math

import numpy as np
import pytest
import torch
from openvla_toy import OPENVLA_STATS

from trl_stare.policies.conventions import (
    CONVENTIONS,
    axis_angle_to_euler,
    axis_angle_to_quaternion,
    euler_to_axis_angle,
    euler_to_quaternion,
    get_convention,
    quaternion_to_axis_angle,
    quaternion_to_euler,
    wxyz_to_xyzw,
    xyzw_to_wxyz,
)
from trl_stare.policies.normalization import ActionStatistics, BinnedActions, quantile_statistics


def statistics(**stats) -> ActionStatistics:
    return ActionStatistics.of_checkpoint({"robot": {"action": stats}})


@pytest.mark.parametrize(
    ("stats", "action", "normalised"),
    [
        ({"q01": [-2.0], "q99": [2.0]}, 1.0, 0.5),
        ({"q01": [0.0], "q99": [4.0]}, 1.0, -0.5),
        ({"q01": [-2.0], "q99": [2.0]}, 9.0, 1.0),  # clipped
        ({"q01": [0.0], "q99": [4.0], "mask": [False]}, 0.7, 0.7),
        ({"min": [-1.0], "max": [3.0]}, 1.0, 0.0),
        ({"mean": [1.0], "std": [0.5]}, 2.0, 2.0),
        ({"mean": [0.0], "std": [0.0], "mask": [False]}, 2.0, 2.0),
        ({"q01": [7.0], "q99": [7.0]}, 7.0, 0.0),  # never moves
        ({"mean": [7.0], "std": [0.0]}, 7.0, 0.0),
        ({"q01": [0.0], "q99": [4.0], "min": [-9.0], "max": [9.0]}, 2.0, 0.0),  # quantiles first
    ],
)
def test_normalising_by_hand(stats, action, normalised):
    value = statistics(**stats).normalize(torch.tensor([action]))
    assert value.item() == pytest.approx(normalised)
    if abs(normalised) < 1:
        assert statistics(**stats).unnormalize(value).item() == pytest.approx(action)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({}, r"must hold \('q01', 'q99'\) or .* got \[\]"),
        ({"q01": [0.0], "q99": [-0.1]}, "at least `q01`"),
        ({"q01": [0.0], "q99": [float("nan")]}, "`q99` must be finite"),
        ({"q01": [0.0, 0.0], "q99": [1.0]}, "`q99` must hold 2 values"),
        ({"q01": [0.0], "q99": [1.0], "mask": [True, False]}, "`mask` must hold 1 values"),
        ({"mean": [0.0], "std": [-1.0]}, "`std` must be at least 0"),
    ],
)
def test_bad_statistics_are_refused(stats, message):
    with pytest.raises(ValueError, match=message):
        statistics(**stats)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unnorm_key": "fractal"}, r"one of \['bridge_orig'\], got 'fractal'"),
        ({"action_dim": 14}, "must hold 14 values, got 7"),
        ({"kind": "normal"}, r"must hold \('mean', 'std'\)"),
    ],
)
def test_statistics_that_are_not_there_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActionStatistics.of_checkpoint(OPENVLA_STATS, **arguments)


def test_of_several_statistics_one_must_be_chosen():
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got None"):
        ActionStatistics.of_checkpoint({"b": {}, "a": {}})


def test_every_bin_survives_a_round_trip_but_the_last():
    """Edges 254 and 255 both decode to the top centre: OpenVLA's own merge."""
    bins = BinnedActions(ActionStatistics.of_checkpoint(OPENVLA_STATS))
    every = torch.arange(256)[:, None].expand(256, 7)
    assert torch.equal(bins.encode(bins.decode(every)), every.clamp(max=254))
    # and in float32, as actions are stored
    assert torch.equal(bins.encode(bins.decode(every).float()), every.clamp(max=254))


def test_bins_are_the_published_tokenizer():
    """`prismatic/vla/action_tokenizer.py`: id = 32000 - digitize(action), and back by the bins' centres."""
    bins = BinnedActions(statistics(q01=[-1.0], q99=[1.0], mask=[False]))
    values = np.concatenate([np.linspace(-1.2, 1.2, 997), np.linspace(-1, 1, 256)])
    edges = np.linspace(-1, 1, 256)
    ids = 32000 - np.digitize(np.clip(values, -1, 1), edges)
    np.testing.assert_array_equal(31999 - bins.encode(torch.from_numpy(values)[:, None])[:, 0].numpy(), ids)
    centers = ((edges[:-1] + edges[1:]) / 2)[np.clip(32000 - ids - 1, 0, 254)]
    np.testing.assert_allclose(bins.decode(torch.from_numpy(31999 - ids)[:, None])[:, 0].numpy(), centers, atol=1e-15)


ROTATIONS = [  # fixed-axes euler -> axis-angle, wxyz: transforms3d 0.4.2, euler2axangle and euler2quat with their defaults
    ((0.1, -0.2, 0.3), (0.1289234, -0.1834258, 0.3087482), (0.9818562, 0.0640713, -0.0911575, 0.1534393)),
    ((1.2, 0.5, -2.0), (1.2318424, -0.9224946, -1.9723179), (0.3145187, 0.4674146, -0.3500346, -0.7483832)),
    ((0.0, 0.0, math.pi / 2), (0.0, 0.0, math.pi / 2), (0.7071068, 0.0, 0.0, 0.7071068)),
    ((-0.05, 0.08, 0.0), (-0.0499733, 0.0799833, 0.002), (0.9988879, -0.0249774, 0.0399768, 0.0009996)),
]


@pytest.mark.parametrize(("euler", "axis_angle", "quaternion"), ROTATIONS)
def test_rotations_are_those_of_transforms3d(euler, axis_angle, quaternion):
    euler, axis_angle, quaternion = (torch.tensor(v, dtype=torch.float64) for v in (euler, axis_angle, quaternion))
    for ours, golden in (
        (euler_to_axis_angle(euler), axis_angle),
        (euler_to_quaternion(euler), quaternion),
        (axis_angle_to_quaternion(axis_angle), quaternion),
        (quaternion_to_axis_angle(-quaternion), axis_angle),
        (quaternion_to_euler(quaternion), euler),
        (axis_angle_to_euler(axis_angle), euler),
    ):
        torch.testing.assert_close(ours, golden, atol=1e-6, rtol=0)


def test_no_rotation_is_smooth():
    zero = torch.zeros(3, requires_grad=True)
    assert axis_angle_to_quaternion(zero).tolist() == [1, 0, 0, 0]
    assert quaternion_to_axis_angle(torch.tensor([1.0, 0, 0, 0])).tolist() == [0, 0, 0]


def test_orders_of_quaternions():
    assert wxyz_to_xyzw(torch.tensor([1, 2, 3, 4])).tolist() == [2, 3, 4, 1]
    assert xyzw_to_wxyz(torch.tensor([2, 3, 4, 1])).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "model", "robot"),
    [  # rotation about z, gripper
        ("bridge", (0.1, 0.996), (0.1, 1.0)),
        ("bridge", (0.1, 0.004), (0.1, -1.0)),
        ("simpler_env", (math.pi / 2, 0.6), (math.pi / 2, 1.0)),
        ("libero", (0.1, 0.996), (0.1, -1.0)),
        ("libero", (0.1, 0.004), (0.1, 1.0)),
    ],
)
def test_conventions_by_hand(name, model, robot):
    action = torch.tensor([0.01, 0.02, 0.03, 0.0, 0.0, *model], dtype=torch.float64)
    expected = torch.tensor([0.01, 0.02, 0.03, 0.0, 0.0, *robot], dtype=torch.float64)
    torch.testing.assert_close(get_convention(name).to_robot(action), expected)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_there_and_back(name):
    convention, generator = get_convention(name), torch.Generator().manual_seed(0)
    action = torch.rand(64, 7, dtype=torch.float64, generator=generator) - 0.5
    action[:, 6] = (action[:, 6] > 0).double()
    torch.testing.assert_close(convention.from_robot(convention.to_robot(action)), action)


def test_conventions_are_named_and_fit_seven_values():
    assert get_convention("identity") is None
    with pytest.raises(ValueError, match=r"\['identity', 'bridge', 'libero', 'simpler_env'\], got 'mars'"):
        get_convention("mars")
    with pytest.raises(ValueError, match=r"got \[14\]"):
        get_convention("bridge").to_robot(torch.zeros(14))


def test_statistics_of_demonstrations_keep_still_what_never_moves():
    """0 to 100; a constant; a gripper that closes once."""
    gripper = torch.ones(101)
    gripper[50] = -1
    values = torch.stack([torch.arange(101.0), torch.full((101,), 7.0), gripper], dim=1)
    values = torch.cat([values, values[:1].expand(400, 3)])  # once in 501 steps
    stats = quantile_statistics(values)
    assert stats["q01"] == [0.0, 7.0, -1.0] and stats["q99"][1:] == [7.0, 1.0] and stats["mask"] == [True] * 3
    bins = BinnedActions(statistics(**stats))
    assert bins.decode(bins.encode(torch.tensor([50.0, 7.0, -1.0]))).tolist() == pytest.approx([50, 7, -1], abs=0.5)
    # whatever is sampled, the constant stays
    assert bins.decode(torch.arange(256)[:, None].expand(256, 3))[:, 1].unique().tolist() == [7.0]


@pytest.mark.parametrize("stats", [{"q01": [7.0], "q99": [7.0]}, {"mean": [7.0], "std": [0.0]}])
def test_noise_does_not_move_what_never_moves(stats):
    assert (statistics(**stats).unnormalize(torch.randn(100, 1)) == 7.0).all()
