"""SimplerEnv's Bridge tasks in the real simulator: configurations, pictures, signals, demonstrator."""

import gymnasium as gym
import pytest
import torch

from trl_stare.data import demonstrate
from trl_stare.envs import get_simulated_task, make_env
from trl_stare.envs.control import speed_up_control
from trl_stare.envs.grasping import speed_up_grasping
from trl_stare.envs.maniskill import Simulator, time_limit
from trl_stare.stages import get_plan

CARROT = "PutCarrotOnPlateInScene-v1"
SPOON = "PutSpoonOnTableClothInScene-v1"
CUBE = "StackGreenCubeOnYellowCubeBakedTexInScene-v1"
EGGPLANT = "PutEggplantInBasketScene-v1"
TASKS = (CARROT, SPOON, CUBE, EGGPLANT)
ROW = torch.tensor([0])
STILL_OPEN = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def make_simulator():
    made = {}

    def make(task, image_size=16):
        if (task, image_size) not in made:
            spec = get_simulated_task(task)
            made[task, image_size] = Simulator(spec, num_envs=1, image_size=image_size, visuals="stock", device="cpu")
        return made[task, image_size]

    yield make
    for simulator in made.values():
        simulator.close()


def begin(simulator, seed):
    simulator.reset([seed], ROW)
    return simulator.signals()


def act(simulator, action):
    simulator.step(action)
    return simulator.signals()


@pytest.mark.bridge_assets
@pytest.mark.parametrize(
    ("task", "count", "steps"), [(CARROT, 24, 60), (SPOON, 24, 60), (CUBE, 24, 60), (EGGPLANT, 64, 120)]
)
def test_simplerenvs_own_settings(make_simulator, task, count, steps):
    simulator = make_simulator(task)
    env, spec = simulator.env, simulator.task
    assert len(env.xyz_configs) * len(env.quat_configs) == spec.configurations == count
    assert time_limit(spec) == steps and env.control_freq == 5
    assert env.control_mode == spec.control_mode and env.agent.uid == spec.robot
    assert env.get_language_instruction() == [spec.instruction]
    assert speed_up_control(env) and speed_up_grasping(env)


@pytest.mark.bridge_assets
def test_a_seed_selects_the_configuration(make_simulator):
    simulator = make_simulator(CARROT)
    starts = {seed: begin(simulator, seed) for seed in (3, 4, 27)}
    assert all(torch.equal(starts[3][name], starts[27][name]) for name in starts[3])
    # configuration 3 is place 3 // 2 and turn 3 % 2 of ManiSkill's lists
    torch.testing.assert_close(
        starts[3]["object_position"][0, :2], simulator.env.xyz_configs[1, 0, :2], atol=5e-3, rtol=0
    )
    for seed, turn in ((3, -torch.pi / 2), (4, torch.pi)):
        w, _, _, z = starts[seed]["object_quaternion"][0]
        assert abs(torch.cos(2 * torch.atan2(z, w) - turn) - 1) < 0.01


@pytest.mark.bridge_assets
def test_a_start_does_not_depend_on_the_episode_before(make_simulator):
    """ManiSkill lets the objects settle while the robot still stands as the last episode left it."""
    simulator = make_simulator(CARROT)
    fresh = begin(simulator, 5)
    for _ in range(8):  # down to the table, where the next carrot will lie
        signals = act(simulator, torch.tensor([[0.015, 0.01, -0.02, 0.0, 0.0, 0.0, -1.0]]))
    assert signals["tcp_position"][0, 2] < 0.92
    again = begin(simulator, 5)
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)


@pytest.mark.bridge_assets
def test_pictures_are_maniskills_own_and_environments_do_not_share_them(make_simulator):
    table, sink, small = make_simulator(CARROT, None), make_simulator(EGGPLANT, None), make_simulator(CARROT, 64)
    for simulator in (table, sink, small):
        begin(simulator, 2)
    pictures = [simulator.images()[0] for simulator in (table, sink, small)]
    assert [tuple(picture.shape) for picture in pictures] == [(480, 640, 3), (480, 640, 3), (64, 64, 3)]
    assert all(picture.dtype == torch.uint8 for picture in pictures)
    # the small picture is the whole large one, squashed
    squashed = torch.nn.functional.adaptive_avg_pool2d(pictures[0].permute(2, 0, 1).float(), (64, 64)).permute(1, 2, 0)
    assert (squashed - pictures[2]).abs().mean() < 6
    for task, picture in ((CARROT, pictures[0]), (EGGPLANT, pictures[1])):
        # ManiSkill's list of visible objects lives on the class: an environment of its own needs an empty one
        from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv

        BaseDigitalTwinEnv._objects_to_remove_from_greenscreen = []
        env = gym.make(
            task, obs_mode="rgb+segmentation", num_envs=1, sim_backend="physx_cpu", render_backend="sapien_cpu"
        )
        obs, _ = env.reset(seed=2, options={"reconfigure": True, "episode_id": ROW + 2})
        assert torch.equal(obs["sensor_data"]["3rd_view_camera"]["rgb"][0], picture)
        env.close()


@pytest.mark.bridge_assets
def test_actions_are_metres_of_the_hands_target(make_simulator):
    simulator = make_simulator(CARROT)
    before = begin(simulator, 0)
    act(simulator, torch.tensor([[0.02, 0.0, -0.03, 0.0, 0.0, 0.0, -1.0]]))
    for _ in range(4):
        after = act(simulator, STILL_OPEN * torch.tensor([1, 1, 1, 1, 1, 1, -1]))
    moved = (after["tcp_position"] - before["tcp_position"])[0]
    # the base looks along -x; gravity pulls the hand down by some millimetres
    torch.testing.assert_close(moved, torch.tensor([-0.02, 0.0, -0.03]), atol=8e-3, rtol=0)
    assert before["gripper_width"] > 0.07 and after["gripper_width"] < 0.04
    torch.testing.assert_close(
        simulator.state()[0],
        torch.cat([after[name][0] for name in ("tcp_position", "tcp_quaternion", "gripper_width")]),
    )


@pytest.mark.bridge_assets
def test_a_drop_ends_the_grasp_though_maniskills_flags_stay(make_simulator):
    simulator, plan = make_simulator(CARROT), get_plan(CARROT)
    expert = simulator.task.demonstrate
    signals = begin(simulator, 0)
    assert not signals["is_grasped"] and not signals["is_contact"]
    held = 0
    for _ in range(40):
        signals = act(simulator, expert(signals))
        held += signals["is_grasped"].item()
        if held == 5:
            break
    assert signals["is_grasped"] and signals["object_lift"] > 0.02
    assert plan.current_stage(signals) == plan.names.index("Transport")
    for _ in range(3):
        signals = act(simulator, STILL_OPEN)
    latched = simulator.env.get_info()
    assert latched["is_src_obj_grasped"] and latched["consecutive_grasp"]
    assert not signals["is_grasped"] and not signals["is_contact"] and signals["object_lift"] < 0.01
    assert plan.current_stage(signals) == plan.names.index("Reach")
    assert signals["success"].item() == latched["success"].item() is False


@pytest.mark.bridge_assets
@pytest.mark.parametrize("task", TASKS)
def test_expert_passes_every_stage(make_simulator, task):
    simulator, plan = make_simulator(task), get_plan(task)
    for seed in (0, 7, 14):
        moments = [begin(simulator, seed)]
        while not moments[-1]["success"] and len(moments) <= time_limit(simulator.task):
            moments.append(act(simulator, simulator.task.demonstrate(moments[-1])))
        assert moments[-1]["success"]
        signals = {name: torch.cat([moment[name] for moment in moments]) for name in moments[0]}
        assert set(plan.current_stage(signals).tolist()) >= {0, 1, 2, 4}
        potential = plan.potential(signals)
        ranks = torch.stack([potential.argsort().argsort(), torch.arange(len(potential))]).double()
        assert torch.corrcoef(ranks)[0, 1] >= 0.9 and potential.min() >= 0 and potential.max() <= 1


@pytest.mark.bridge_assets
def test_make_env_shows_the_tasks_own_picture():
    env = make_env(CARROT, num_envs=1, num_workers=1)
    start = env.reset([0])
    assert start.obs.images.shape == (1, 480, 640, 3) and start.obs.images.float().std() > 20
    assert start.obs.instructions == ("put carrot on plate",) and start.obs.state.shape == (1, 8)
    assert env.max_episode_steps == 60 and env.metadata["image_shape"] == [480, 640]
    env.close()


@pytest.mark.bridge_assets
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", TASKS)
def test_expert_on_every_configuration(task):
    env = make_env(task, num_envs=2, num_workers=2, image_size=16)
    shown = demonstrate(env, get_simulated_task(task).demonstrate, range(get_simulated_task(task).configurations))
    env.close()
    assert sum(trajectory.success_once for trajectory in shown) >= 0.95 * len(shown)


def test_expert_goes_back_up_when_the_object_is_lost():
    """Fingers closed beside the carrot: it opens them and goes up and over, because it looks at nothing but the present."""
    signals = {
        "tcp_position": torch.tensor([[0.05, 0.0, 0.9]]),
        "tcp_quaternion": torch.tensor([[0.0, 0.7071, 0.0, 0.7071]]),
        "gripper_width": torch.tensor([[0.028]]),
        "object_position": torch.tensor([[0.0, 0.0, 0.888]]),
        "object_quaternion": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        "object_lift": torch.tensor([[0.0]]),
        "goal_position": torch.tensor([[0.1, 0.1, 0.892]]),
        "is_grasped": torch.tensor([False]),
    }
    action = get_simulated_task(CARROT).demonstrate(signals)
    assert action.shape == (1, 7) and action[0, 6] == 1.0
    assert action[0, 0] > 0 and action[0, 2] > 0  # the base's x points along the world's -x


def test_missing_assets_are_named_and_nobody_is_asked(monkeypatch):
    from mani_skill.utils import assets

    monkeypatch.setattr(assets, "is_data_source_downloaded", lambda name: False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("ManiSkill asked"))
    command = "python -m mani_skill.utils.download_asset"
    with pytest.raises(FileNotFoundError, match=f"{command} bridge_v2_real2sim && {command} widowx250s"):
        make_env(CARROT, num_envs=2, num_workers=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"visuals": "light"}, "`visuals` must be 'stock'"),
        ({"device": "cuda"}, "`device` must be 'cpu'"),
        ({"image_size": 0}, "`image_size` must be at least 1"),
    ],
)
def test_what_the_tasks_cannot_do_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_env(CARROT, num_envs=1, **kwargs)
