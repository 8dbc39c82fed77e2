"""Real ManiSkill environments in worker processes: seeds, chunks, ends, determinism."""

from contextlib import closing

import pytest
import torch

from trl_stare.data import demonstrate, replay
from trl_stare.envs import PickAndPlaceExpert, get_simulated_task, make_env, vector
from trl_stare.envs.maniskill import Simulator
from trl_stare.envs.worker import assign
from trl_stare.interfaces import EpisodeStart

TASK = "StackCube-v1"


@pytest.fixture(scope="module")
def env():
    env = make_env(TASK, num_envs=4, num_workers=2, chunk_size=3, image_size=32)
    yield env
    env.close()


@pytest.fixture(scope="module")
def step_env():
    env = make_env(TASK, num_envs=4, num_workers=2, chunk_size=1, image_size=32)
    yield env
    env.close()


def random_chunks(env, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, env.num_envs, env.chunk_size, 7, generator=generator) * 2 - 1


def test_same_seeds_and_actions_give_identical_states_and_images(env):
    chunks = random_chunks(env, 4)
    runs = []
    for _ in range(2):
        start = env.reset([11, 12, 13, 14])
        runs.append([start, *(env.step(chunk) for chunk in chunks)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.obs.images, second.obs.images) and torch.equal(first.obs.state, second.obs.state)
        assert all(torch.equal(first.signals[name], second.signals[name]) for name in first.signals)


def test_a_seed_gives_the_same_episode_in_every_environment(env):
    start = env.reset([7, 7, 7, 8])
    assert torch.equal(start.obs.images[0], start.obs.images[1]) and torch.equal(
        start.obs.images[0], start.obs.images[2]
    )
    assert not torch.equal(start.obs.images[0], start.obs.images[3])


@pytest.mark.parametrize(
    "draw",
    [
        lambda env, rows: torch.rand(len(rows), 2),
        lambda env, rows: torch.tensor(env._episode_rng.normal(size=(len(rows), 2))),
        lambda env, rows: torch.tensor(env._batched_episode_rng[rows].normal(size=2)),
    ],
    ids=["torch", "episode_rng", "batched_episode_rng"],
)
def test_a_start_of_parallel_scenes_is_a_function_of_its_seed(monkeypatch, draw):
    """ManiSkill's own reset of the scenes of a GPU, as far as it goes without one, and all that a task may draw from in it."""
    drawn, row = {}, torch.arange(3)

    def begin(rows, options):
        drawn.update(zip(rows.tolist(), draw(env, rows), strict=True))

    with closing(
        Simulator(get_simulated_task(TASK), num_envs=1, image_size=16, visuals="light", device="cpu")
    ) as made:
        env, made.is_rebuilt, made.num_envs, made._is_fresh = made.env, False, 3, row < 0
        scenes = {"num_envs": 3, "_elapsed_steps": row + 1, "agent": None}
        for name, value in (scenes | {"_initialize_episode": begin, "get_info": dict}).items():
            monkeypatch.setattr(env, name, value)
        made.reset([7, 7, 8], row)
        first = dict(drawn)
        assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
        drawn.clear()
        env._elapsed_steps, made._is_fresh = row + 1, row < 0
        made.reset([8, 7], row[1:])
        assert sorted(drawn) == [1, 2] and torch.equal(drawn[1], first[2]) and torch.equal(drawn[2], first[0])
        assert env._elapsed_steps.tolist() == [1, 0, 0] and made._is_fresh.tolist() == [False, True, True]


def test_workers_that_are_asked_for_simulate_on_the_cpu(monkeypatch):
    """Also where there is a GPU, whose simulation would refuse them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with closing(make_env(TASK, num_envs=2, num_workers=1, image_size=16)) as env:
        assert env.metadata["sim_backend"] == "physx_cpu"


@pytest.mark.parametrize(
    ("num_envs", "cores", "num_workers"),
    [(16, 12, 8), (16, 16, 16), (4, 3, 2), (8, 7, 4), (64, 48, 32), (3, 64, 3), (7, 6, 1), (1, 2, 1)],
)
def test_the_default_workers_share_the_environments_evenly_on_any_machine(monkeypatch, num_envs, cores, num_workers):
    monkeypatch.setattr(vector.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(
        vector, "WorkerVectorEnv", lambda spec, **sizes: sizes
    )  # a process for each would take minutes
    assert make_env(TASK, num_envs, device="cpu")["num_workers"] == num_workers


def test_a_process_simulates_and_renders_on_its_own_gpu(monkeypatch):
    """Asked for on the second GPU, up to where ManiSkill looks for it; what is recorded does not say which one it was."""
    import gymnasium
    from mani_skill.envs.utils.system import backend

    def make(env_id, **options):
        raise RuntimeError(f"{options['sim_backend']} {options['render_backend']}")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(gymnasium, "make", make)
    with closing(make_env(TASK, num_envs=2, device="cuda")) as env:
        assert (env.metadata["sim_backend"], env.metadata["render_backend"]) == ("physx_cuda", "sapien_cuda")
        with pytest.raises(RuntimeError) as asked:
            env.workers[0].reset_async(assign([EpisodeStart(0)], 0, 1, 2, False))
            env.workers[0].wait()
    monkeypatch.setattr(backend.sapien, "Device", str)
    found = backend.parse_sim_and_render_backend(*str(asked.value).split())
    assert (found.device, found.sim_device, found.render_device) == (torch.device("cuda:1"), "cuda:1", "cuda:1")


def test_nothing_of_the_last_episode_is_left_after_a_reset(step_env):
    """PhysX keeps the contacts of the last step: a reset while the cube is held must not begin with "grasped"."""
    fresh = step_env.reset([0, 1, 2, 3]).signals
    expert, signals = get_simulated_task(TASK).demonstrate, fresh
    for _ in range(14):
        signals = step_env.step(expert(signals)[:, None]).signals
    assert signals["is_grasped"].any() and signals["is_contact"].any()
    again = step_env.reset([0, 1, 2, 3]).signals
    assert not again["is_grasped"].any() and not again["is_contact"].any()
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)


def test_shapes_and_types(env):
    start = env.reset([0, 1, 2, 3])
    step = env.step(torch.zeros(4, 3, 7))
    assert start.obs.images.shape == (4, 32, 32, 3) and start.obs.images.dtype == torch.uint8
    assert (
        step.chunk_signals["object_position"].shape == (4, 3, 3) and step.chunk_signals["success"].dtype == torch.bool
    )
    assert step.num_steps.tolist() == [3, 3, 3, 3] and not (step.terminated | step.truncated).any()
    for name, value in step.signals.items():
        assert torch.equal(value, step.chunk_signals[name][:, -1])


def test_time_limit_truncates_and_the_next_seed_begins(env):
    """50 steps are 16 chunks of 3 and one of 2; with 5 seeds one environment plays on and three become idle."""
    chunk = torch.zeros(4, 3, 7)
    start = env.reset([0, 1, 2, 3, 4])
    assert sorted(start.episode.tolist()) == [0, 1, 2, 3]
    for _ in range(16):
        step = env.step(chunk)
        assert not step.truncated.any()
    step = env.step(chunk)
    assert step.truncated.all() and not step.terminated.any() and step.num_steps.tolist() == [2, 2, 2, 2]
    assert sorted(step.episode.tolist()) == [-1, -1, -1, 4]
    (row,) = torch.nonzero(step.episode == 4).flatten().tolist()
    # `obs` belongs to the new episode, `final_obs` and `final_signals` to the one that ended
    assert not torch.equal(step.obs.images[row], step.final_obs.images[row])
    assert torch.equal(step.final_signals["object_position"][row], step.chunk_signals["object_position"][row, 1])
    assert torch.equal(step.chunk_signals["object_position"][row, 1], step.chunk_signals["object_position"][row, 2])
    fresh = env.reset([4])
    assert torch.equal(fresh.obs.images[fresh.episode == 0][0], step.obs.images[row])


def test_idle_environments_stay_idle(env):
    start = env.reset([5])
    assert start.episode.tolist().count(-1) == 3
    step = env.step(torch.zeros(4, 3, 7))
    assert sorted(step.num_steps.tolist()) == [0, 0, 0, 3]


@pytest.mark.parametrize(
    ("actions", "message"),
    [(torch.zeros(4, 2, 7), r"shape \(4, 3, 7\), got \(4, 2, 7\)"), (torch.full((4, 3, 7), float("nan")), "finite")],
)
def test_bad_actions_are_refused(env, actions, message):
    env.reset([0, 1, 2, 3])
    with pytest.raises(ValueError, match=message):
        env.step(actions)


def test_expert_demonstrates_with_and_without_mistakes(step_env):
    expert = get_simulated_task(TASK).demonstrate
    clean = demonstrate(step_env, expert, range(16))
    noisy = demonstrate(step_env, expert, range(16), noise=0.1, generator=torch.Generator().manual_seed(0))
    assert sum(trajectory.success_once for trajectory in clean) >= 15
    assert sum(trajectory.success_once for trajectory in noisy) >= 10
    assert all(torch.equal(trajectory.actions, trajectory.labels) for trajectory in clean)
    mistakes = torch.cat([(t.actions != t.labels).any(dim=-1) for t in noisy]).float().mean()
    assert 0.05 < mistakes < 0.15
    assert [trajectory.seed for trajectory in clean] == list(range(16))
    first = clean[0]
    assert first.terminated and first.reward.sum() == 1 and first.signals["success"].shape == (first.num_steps + 1,)
    again = replay(step_env, first)
    assert torch.equal(again.images, first.images)


@pytest.mark.slow
def test_expert_on_a_hundred_seeds(step_env):
    shown = demonstrate(step_env, get_simulated_task(TASK).demonstrate, range(100))
    assert sum(trajectory.success_once for trajectory in shown) >= 95


def test_expert_recovers_from_a_mistake_by_itself():
    """Fingers closed beside the cube: the expert opens them, because it looks at nothing but the present."""
    signals = {
        "tcp_position": torch.tensor([[0.05, 0.0, 0.02]]),
        "tcp_quaternion": torch.tensor([[0.0, 1.0, 0.0, 0.0]]),
        "object_position": torch.tensor([[0.0, 0.0, 0.02]]),
        "object_quaternion": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        "goal_position": torch.tensor([[0.1, 0.1, 0.06]]),
        "is_grasped": torch.tensor([False]),
    }
    action = PickAndPlaceExpert()(signals)
    assert action[0, 6] == 1.0 and action[0, 0] < 0 and action[0, 2] > 0  # opens, goes back, goes up first


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"task": "StackCubes-v1"}, "Did you mean 'StackCube-v1'"),
        ({"task": TASK, "visuals": "pretty"}, "`visuals` must be one of"),
        ({"task": TASK, "num_envs": 3, "num_workers": 2}, "multiple of `num_workers`"),
        ({"task": TASK, "num_envs": 0}, "at least 1"),
        ({"task": TASK, "num_workers": 2, "device": "cuda"}, "`num_workers` must be 0 on CUDA.*got 2"),
    ],
)
def test_bad_arguments_are_refused_before_any_simulation(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_env(**kwargs)


def test_an_episode_does_not_depend_on_those_before_it(step_env):
    """PhysX remembers past contacts in ways a reset does not undo; a fifth of all grasps came out differently before scenes
    were built anew."""
    expert = get_simulated_task(TASK).demonstrate
    alone = demonstrate(step_env, expert, range(4))
    later = demonstrate(step_env, expert, [*range(20, 32), *range(4)])
    for first, second in zip(alone, later[-4:], strict=True):
        assert torch.equal(first.actions, second.actions) and torch.equal(first.images, second.images)
        assert all(torch.equal(first.signals[name], second.signals[name]) for name in first.signals)
