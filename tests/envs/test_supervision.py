"""Rollouts that begin in the middle of an episode, or lose their simulators on the way: the same to the bit."""

import os
import signal
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from trl_stare.data import collect
from trl_stare.data.actors import Decision
from trl_stare.data.rollout import Timing
from trl_stare.envs import get_simulated_task, make_env, worker
from trl_stare.envs.vector import WorkerVectorEnv
from trl_stare.envs.worker import assign
from trl_stare.interfaces import EpisodeStart

TASK = "StackCube-v1"
STARTS = [3, 4, 5, 6, 7]
# patience for a machine with other things to do: a step that takes longer than `step_timeout` is only one restart more
OPTIONS = {"num_workers": 2, "chunk_size": 10, "image_size": 16, "step_timeout": 5.0, "max_restarts": 20}


@pytest.fixture(scope="module")
def env():
    with closing(make_env(TASK, 4, **OPTIONS)) as env:
        yield env


def chance(on_decision=None):
    """Random chunks; `on_decision` is told how often it has acted."""
    generator, count = torch.Generator().manual_seed(0), 0

    def act(obs, signals) -> Decision:
        nonlocal count
        count += 1
        if on_decision is not None:
            on_decision(count)
        actions = torch.rand(len(obs.images), 10, 7, generator=generator) * 2 - 1
        return Decision(actions, actions)

    return act


def assert_equal(first, second) -> None:
    assert [t.seed for t in first] == [t.seed for t in second]
    for one, other in zip(first, second, strict=True):
        for name in ("images", "state", "starts", "actions", "final_image", "final_state", "reward"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert all(torch.equal(one.signals[name], other.signals[name]) for name in one.signals)


@pytest.fixture(scope="module")
def undisturbed(env):
    return collect(env, chance(), STARTS, name="chance")


def test_a_start_leads_to_the_recorded_state_in_every_process(env, undisturbed):
    """20 of 50 actions executed without rendering: images and signals are those of the recording, and so is what follows."""
    one = undisturbed[0]
    start = EpisodeStart(one.seed, one.actions[:20])
    first = env.reset([start, start, 8, 9])  # one in each worker
    assert first.episode.tolist() == [0, 2, 1, 3]
    for row in (0, 2):
        assert torch.equal(first.obs.images[row], one.images[2]) and torch.equal(first.obs.state[row], one.state[2])
        assert all(torch.equal(value[row], one.signals[name][20]) for name, value in first.signals.items())


def test_the_time_limit_counts_the_actions_of_a_start(env, undisturbed):
    one = undisturbed[0]
    rest = iter(one.actions[20:].split(10))

    def go_on(obs, signals):
        chunk = next(rest)[None]
        return Decision(chunk, chunk)

    (played,) = collect(env, go_on, [EpisodeStart(one.seed, one.actions[:20])], name="chance")
    assert played.num_steps == 30 and played.truncated and torch.equal(played.prefix, one.actions[:20])
    assert torch.equal(played.images, one.images[2:]) and torch.equal(played.final_image, one.final_image)
    assert all(torch.equal(value, one.signals[name][20:]) for name, value in played.signals.items())
    assert undisturbed[0].prefix is None


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            EpisodeStart(4, torch.zeros(50, 7)),
            "of the 50 actions of seed 4 of 'StackCube-v1' number 50 meets the time",
        ),
        (EpisodeStart(4, torch.full((2, 7), float("nan"))), r"seed 4 must be finite \[P, 7\], got \(2, 7\) with 14"),
        (EpisodeStart(4, torch.zeros(2, 6)), r"seed 4 must be finite \[P, 7\], got \(2, 6\)"),
        (EpisodeStart(-1), "seeds >= 0, got -1"),
    ],
)
def test_a_start_that_is_none_is_refused(env, start, message):
    with pytest.raises(ValueError, match=message):
        env.reset([3, start])
    assert env.reset([3]).episode.tolist() == [0, -1, -1, -1]  # and the environments are as good as before


def test_who_plays_what():
    starts = [EpisodeStart(seed) for seed in range(10, 17)]
    found = assign(starts, rank=1, world_size=2, num_envs=2, ignore=False)
    assert (found.episodes, found.queue) == ([1, 3], [5])
    assert found.starts == {1: (11, None), 3: (13, None), 5: (15, None)}
    assert assign(starts[:2], rank=1, world_size=2, num_envs=2, ignore=True).episodes == [1, -1]


def test_dead_and_hanging_workers_are_replaced_and_nothing_changes(env, undisturbed, caplog):
    """One worker is killed while it simulates, the other stopped; later the replacement of the first is killed, too."""
    pids = [worker.pid for worker in env.workers]

    def disturb(count):
        if count == 4:  # the policy acts on the second part
            os.kill(env.workers[0].pid, signal.SIGKILL)
        if count == 5:
            os.kill(env.workers[1].pid, signal.SIGSTOP)
        if count == 9:
            os.kill(env.workers[0].pid, signal.SIGKILL)

    assert_equal(collect(env, chance(disturb), STARTS, name="chance"), undisturbed)
    assert all(worker.pid != pid for worker, pid in zip(env.workers, pids, strict=True))
    failures = [record.getMessage() for record in caplog.records if "is replaced" in record.getMessage()]
    assert len(failures) >= 3 and any("TimeoutError" in text and "seeds [4, 6]" in text for text in failures)


def test_a_worker_that_grew_is_replaced_when_an_episode_ends(env, undisturbed, monkeypatch):
    sizes = iter(range(0, 10**15, 2**40))
    monkeypatch.setattr(worker, "resident_bytes", lambda pid: next(sizes))
    pids = [worker.pid for worker in env.workers]
    assert_equal(collect(env, chance(), STARTS, name="chance"), undisturbed)
    assert env.workers[0].pid != pids[0]


def test_after_too_many_restarts_the_error_names_task_and_seeds(env, monkeypatch):
    monkeypatch.setattr(env.workers[0], "_max_restarts", 0)
    env.reset([3, 4, 5, 6])
    os.kill(env.workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker 0 of StackCube-v1 failed 1 times.*`max_restarts` = 0.*\[3, 5\]"):
        env.step(torch.zeros(4, 10, 7))
    assert env.reset([3]).episode.tolist() == [0, -1, -1, -1]  # a new rollout may try again


def test_memory_of_a_process_is_read():
    assert 2**24 < worker.resident_bytes(os.getpid()) < 2**36
    assert worker.resident_bytes(2**30) == 0


def spoiled(at: dict[int, int], bugs: dict[int, Exception] | None = None, num_workers: int = 0) -> WorkerVectorEnv:
    """Two environments; the object of seed `s` is nowhere after `at[s]` steps, and seed `s` meets the error `bugs[s]` in its code."""
    given, bugs = get_simulated_task(TASK), bugs or {}

    def signals(env, info):
        read, seed = given.signals(env, info), int(env._episode_seed[0])
        if seed in bugs:
            raise bugs[seed]
        if int(env._elapsed_steps[0]) == at.get(seed):
            read["object_position"] = read["object_position"] * float("nan")
        return read

    task = replace(given, signals=signals)
    return WorkerVectorEnv(
        task, num_envs=2, num_workers=num_workers, chunk_size=10, image_size=16, visuals="light", device="cpu"
    )


@pytest.mark.parametrize("trouble", [KeyError("cube"), ValueError("no cube"), None], ids=["crash", "error", "voided"])
def test_a_replacement_that_is_not_where_the_episodes_were_is_replaced_too(tmp_path, caplog, trouble):
    """After the first replacement has executed the ten actions again; each file in the folder spoils one look at that moment."""
    given = get_simulated_task(TASK)

    def signals(env, info):
        read, spoil = given.signals(env, info), sorted(tmp_path.iterdir())
        if int(env._elapsed_steps[0]) == 10 and spoil:
            spoil[0].unlink()
            if trouble is not None:
                raise trouble
            read["object_position"] = read["object_position"] * float("nan")
        return read

    chunks = torch.rand(2, 1, 10, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes = {"num_envs": 1, "num_workers": 1, "chunk_size": 10, "image_size": 16, "visuals": "light", "device": "cpu"}
    with closing(WorkerVectorEnv(replace(given, signals=signals), **sizes)) as env:
        env.reset([3])
        expected = [env.step(chunk) for chunk in chunks]
        env.reset([3])
        env.step(chunks[0])
        # the void one is looked at twice: while it is played again, and where it then is
        for name in ["once", "twice"][: 1 if trouble else 2]:
            (tmp_path / name).touch()
        os.kill(env.workers[0].pid, signal.SIGKILL)
        after = env.step(chunks[1])
    assert after.episode.tolist() == [0] and torch.equal(after.obs.images, expected[1].obs.images)
    assert torch.equal(after.chunk_signals["object_position"], expected[1].chunk_signals["object_position"])
    assert "could not be played again" in caplog.text


def test_void_episodes_are_told_of_and_the_others_stay():
    told, timing = [], Timing()
    with closing(
        spoiled({4: 0, 5: 13, 7: 0})
    ) as env:  # 7 follows 3, which has just ended: it is told of in the same step
        with pytest.raises(
            ValueError,
            match=r"`signals\['object_position'\]` of task 'StackCube-v1' .* not at step 13 of seed 5",
        ):
            collect(env, chance(), [3, 5], name="chance")
        starts = [*STARTS, 8]
        played = collect(env, chance(), starts, name="chance", on_void=lambda *void: told.append(void), timing=timing)
    assert [t.seed for t in played] == [3, 6, 8] and all(t.num_steps == 50 for t in played)
    assert sorted((start.seed, void.step, void.what) for start, void in told) == [
        (4, 0, "signals['object_position']"),
        (5, 13, "signals['object_position']"),
        (7, 0, "signals['object_position']"),
    ]
    assert all(torch.isfinite(value).all() for t in played for value in t.signals.values())
    # one process: what it does not simulate or render, it acts or keeps books
    assert timing.simulate_s > 0 and timing.render_s > 0 and 0 < timing.idle_s < timing.total_s


def test_void_episodes_and_errors_of_worker_processes():
    """Worker 0 plays episodes 0, 2 and 4 of the starts, worker 1 those between: an environment each."""
    told = []
    with closing(spoiled({4: 0, 5: 13}, {9: KeyError("cube"), 10: ValueError("no cube")}, num_workers=2)) as env:
        played = collect(env, chance(), STARTS, name="chance", on_void=lambda *void: told.append(void))
        assert [(t.seed, t.env) for t in played] == [(3, 0), (6, 1), (7, 0)]
        assert sorted((start.seed, void.step, void.env) for start, void in told) == [(4, 0, 1), (5, 13, 0)]
        assert all(torch.isfinite(value).all() for t in played for value in t.signals.values())
        pids = [worker.pid for worker in env.workers]
        with pytest.raises(
            RuntimeError, match=r"(?s)task 'StackCube-v1' failed while it played seeds \[9\].*KeyError: 'cube'"
        ):
            env.reset([3, 9])
        with pytest.raises(ValueError, match="no cube"):
            env.reset([3, 10])
        assert env.reset([3, 6]).episode.tolist() == [0, 1]
        assert [worker.pid for worker in env.workers] == pids  # they are as good as before


def test_errors_of_the_simulator_in_this_process_name_the_seeds():
    with closing(spoiled({}, {9: RuntimeError("lost")})) as env:
        with pytest.raises(
            RuntimeError, match=r"(?s)'StackCube-v1' failed while it played seeds \[9\].*RuntimeError: lost"
        ):
            env.reset([3, 9])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_simulator_of_this_process_knows_nothing_of_the_policys_autocast(monkeypatch, kind):
    task, seen = get_simulated_task(TASK), []

    def signals(env, info):
        seen.append(torch.is_autocast_enabled(kind))
        return task.signals(env, info)

    sizes = {"num_envs": 1, "num_workers": 0, "chunk_size": 1, "image_size": 16, "visuals": "light", "device": "cpu"}
    with closing(WorkerVectorEnv(replace(task, signals=signals), **sizes)) as env:
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        with torch.autocast(kind, dtype=torch.float16):
            env.reset([0])
            env.step(torch.zeros(1, 1, 7))
            assert torch.is_autocast_enabled(kind)
    assert seen == [False, False]
