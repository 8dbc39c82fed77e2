"""Collections that are interrupted, continued and extended, on the real simulator."""

import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from filelock import FileLock

from trl_stare.actors import load_actor
from trl_stare.data import (
    check_labels,
    collect_dataset,
    load_trajectories,
    relabel_dataset,
    save_pairs,
    stored_settings,
)
from trl_stare.data.actors import Decision, policy_actor
from trl_stare.envs import make_env
from trl_stare.policies import TokenPolicy
from trl_stare.stages import get_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
from ppo_toy import PLAN as TOY_PLAN  # noqa: E402
from ppo_toy import STATS, SpoiledEnv, ToyEnv  # noqa: E402

TASK = "StackCube-v1"
PLAN = get_plan(TASK)


@pytest.fixture(scope="module")
def env():
    env = make_env(TASK, num_envs=4, num_workers=2, image_size=16)
    yield env
    env.close()


def collected(env, folder, episodes, *, noise=0.0, **options):
    actor = load_actor("expert", TASK, noise=noise)
    collect_dataset(
        env, actor.make, folder, PLAN, episodes=episodes, name="expert", settings={"noise": noise}, **options
    )
    return load_trajectories(folder)


def test_a_dataset_that_load_dataset_reads(env, tmp_path):
    trajectories = collected(env, tmp_path / "demos", 5, first_seed=10)
    assert [trajectory.seed for trajectory in trajectories] == [10, 11, 12, 13, 14]
    assert all(trajectory.policy == "expert" for trajectory in trajectories)
    rows = datasets.load_dataset(str(tmp_path / "demos"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"] == [0, 1, 2, 3, 4] and rows[0]["stage_names"] == list(PLAN.names)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "demos", ".demos.lock"}


class Interrupted(Exception):
    pass


def test_an_interrupted_collection_keeps_what_is_finished_and_continues(env, tmp_path, capsys):
    done = []

    def interrupt(trajectory):
        done.append(trajectory.seed)
        if len(done) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        collected(env, tmp_path / "demos", 6, on_episode=interrupt)
    assert not (tmp_path / "demos").exists()
    again = []
    capsys.readouterr()
    trajectories = collected(env, tmp_path / "demos", 6, on_episode=lambda trajectory: again.append(trajectory.seed))
    shown = capsys.readouterr().err.split("\r")
    assert "demos:  50%" in shown[1] and "3/6" in shown[1] and "6/6" in shown[-1]
    assert sorted(done + again) == list(range(6))
    assert [trajectory.seed for trajectory in trajectories] == list(range(6))
    # a demonstrator without noise shows the same whether or not it was interrupted
    for one, two in zip(trajectories, collected(env, tmp_path / "at_once", 6), strict=True):
        assert torch.equal(one.actions, two.actions) and torch.equal(one.images, two.images)


def test_a_finished_collection_is_left_alone_and_can_be_extended(env, tmp_path):
    collected(env, tmp_path / "demos", 3)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "demos").iterdir()}
    collected(env, tmp_path / "demos", 3)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "demos").iterdir()}
    assert [trajectory.seed for trajectory in collected(env, tmp_path / "demos", 5)] == [0, 1, 2, 3, 4]


def test_fewer_episodes_than_there_are_lose_none(tmp_path):
    def collect(episodes, **options):
        env = SpoiledEnv()
        make = {"episodes": episodes, "progress": False, **options}
        collect_dataset(env, lambda _: to_the_middle, tmp_path / "rollouts", TOY_PLAN, **make)
        return env.played, [one.seed for one in load_trajectories(tmp_path / "rollouts")]

    def interrupt(trajectory):
        if trajectory.seed == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        collect(20, on_episode=interrupt)
    assert collect(3) == ([], [0, 1, 2])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "rollouts").iterdir()}
    assert collect(2) == ([], [0, 1, 2])
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "rollouts").iterdir()}
    assert collect(6) == ([], [*range(6)])
    played, seeds = collect(10)
    assert seeds == [*range(10)] and min(played) > 6
    assert {path.name for path in tmp_path.iterdir()} == {"rollouts", ".rollouts.lock"}


def test_an_empty_folder_is_a_new_one(tmp_path):
    (tmp_path / "rollouts").mkdir()
    folder = collect_dataset(ToyEnv(2), lambda _: to_the_middle, tmp_path / "rollouts", TOY_PLAN, episodes=2)
    assert len(load_trajectories(folder)) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "signal_names",
            ("distance", "height", "success"),
            r"other `signals`: \['distance', 'height', 'success'\], there \['dist",
        ),
        ("instruction", "go away", r"other `instruction`: \['go away'\], there \['go to the middle'\]. Give"),
    ],
)
def test_a_task_that_was_changed_is_not_continued(tmp_path, name, value, message):
    def collect(env, episodes):
        return collect_dataset(env, lambda _: to_the_middle, tmp_path / "rollouts", TOY_PLAN, episodes=episodes)

    collect(ToyEnv(2), 2)
    env = SpoiledEnv()
    setattr(env, name, value)
    with pytest.raises(ValueError, match=message):
        collect(env, 4)
    assert env.played == []


def test_a_second_process_waits_and_then_finds_it_done(env, tmp_path, caplog):
    """Two that play the same seeds at once once removed each other's episodes."""
    entered, ready = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / ".demos.lock"):
            entered.set()
            while "waiting for it" not in caplog.text:
                time.sleep(0.05)
            shutil.copytree(tmp_path / "other", tmp_path / "demos")
            ready.set()

    played = collected(env, tmp_path / "other", 4)
    first = threading.Thread(target=hold, daemon=True)
    first.start()
    assert entered.wait(60)
    again = []
    found = collected(env, tmp_path / "demos", 4, on_episode=again.append)
    first.join(60)
    assert ready.is_set() and again == [] and [one.seed for one in found] == [one.seed for one in played]


def test_other_settings_are_refused(env, tmp_path):
    collected(env, tmp_path / "demos", 2)
    with pytest.raises(
        ValueError,
        match=r"of the same collection, got .*demos, collected with noise 0.0, not 0.5; seed 0, not 7\. Give",
    ):
        collected(env, tmp_path / "demos", 3, noise=0.5, seed=7)


def test_what_is_no_collection_is_refused_before_anything_is_played(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").touch()
    save_pairs([], tmp_path / "pairs")
    for name, message in (
        ("mine", r"'README.md'\]. Move them away"),
        ("pairs", "got .*pairs with other data: .* no column 'id'"),
    ):
        env = SpoiledEnv()
        with pytest.raises(ValueError, match=message):
            collect_dataset(env, lambda _: to_the_middle, tmp_path / name, TOY_PLAN, episodes=2)
        assert env.played == []


def test_a_collection_of_another_plan_is_continued_once_it_is_labelled_anew(tmp_path):
    def collect(plan, episodes, **options):
        make = {"episodes": episodes, "progress": False, **options}
        return collect_dataset(ToyEnv(2), lambda _: to_the_middle, tmp_path / "rollouts", plan, **make)

    def interrupt(trajectory):
        raise Interrupted

    other = replace(TOY_PLAN, stages=tuple(replace(one, cost_scale=2 * one.scale) for one in TOY_PLAN.stages))
    with pytest.raises(FileNotFoundError, match="must hold a collection, got .*rollouts"):
        relabel_dataset(tmp_path / "rollouts", other)
    collect(TOY_PLAN, 2)
    with pytest.raises(Interrupted):
        collect(TOY_PLAN, 4, on_episode=interrupt)
    with pytest.raises(ValueError, match=r"rollouts.*, row 0 must be labelled by the plan of .* got `segments`"):
        collect(other, 4)
    before = load_trajectories(tmp_path / "rollouts")
    relabel_dataset(tmp_path / "rollouts", other)
    after = load_trajectories(collect(other, 4))
    assert [one.seed for one in after] == [0, 1, 2, 3] and torch.equal(after[0].images, before[0].images)
    check_labels(tmp_path / "rollouts", other)


def test_several_episodes_per_seed_each_exactly_once(env, tmp_path):
    """Interrupted in the middle of a seed, continued, extended: rows stay in the order of (seed, repeat)."""
    done, flags = [], {"noise": 0.5, "episodes_per_seed": 3, "first_seed": 7}

    def interrupt(trajectory):
        done.append(trajectory)
        if len(done) == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        collected(env, tmp_path / "demos", 7, on_episode=interrupt, **flags)
    first = collected(env, tmp_path / "demos", 7, on_episode=done.append, **flags)
    assert len(done) == 7
    assert [trajectory.seed for trajectory in first] == [7, 7, 7, 8, 8, 8, 9]
    # every row is one of those that were played, and no two are the same one
    rows = {tuple(trajectory.actions.flatten().tolist()) for trajectory in first}
    assert rows == {tuple(trajectory.actions.flatten().tolist()) for trajectory in done} and len(rows) == 7

    extended = collected(env, tmp_path / "demos", 10, **flags)
    assert [trajectory.seed for trajectory in extended] == [7, 7, 7, 8, 8, 8, 9, 9, 9, 10]
    assert all(torch.equal(one.actions, two.actions) for one, two in zip(first, extended[:7], strict=True))
    assert {path.name for path in tmp_path.iterdir()} == {"demos", ".demos.lock"}
    with pytest.raises(ValueError, match="`episodes_per_seed` must be 1 with `successes_only`, got 3"):
        collected(env, tmp_path / "other", 3, successes_only=True, episodes_per_seed=3)


def test_what_was_tidied_up_too_late_is_not_taken_twice(env, tmp_path):
    """Killed between the two: the dataset is in its place, and the single episodes are still there."""
    collected(env, tmp_path / "demos", 3, episodes_per_seed=2)
    partial = tmp_path / ".demos.partial"
    partial.mkdir()
    for key in ("0-0", "0-1", "1-0"):
        shutil.copytree(tmp_path / "demos", partial / key)
    assert [t.seed for t in collected(env, tmp_path / "demos", 2, episodes_per_seed=2)] == [0, 0, 1]
    assert not partial.exists()


def test_a_kill_between_taking_the_old_dataset_away_and_putting_the_new_in_its_place(env, tmp_path, monkeypatch):
    collected(env, tmp_path / "demos", 2)
    put = os.replace

    def killed(source, target):
        if str(source).endswith(".new") and Path(target).name == "demos":
            raise Interrupted
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Interrupted):
            collected(env, tmp_path / "demos", 3)
    assert not (tmp_path / "demos").exists()
    again = []
    found = collected(env, tmp_path / "demos", 3, on_episode=again.append)
    assert [one.seed for one in found] == [0, 1, 2] and again == []


def test_failures_are_not_played_again_when_successes_are_extended(env, tmp_path):
    class Recorded:
        """The environment, and which seeds it was given."""

        def __init__(self):
            self.seeds = []

        def __getattr__(self, name):
            return getattr(env, name)

        def reset(self, seeds, **options):
            self.seeds += seeds
            return env.reset(seeds, **options)

    options = {"noise": 0.4, "successes_only": True}
    kept = [trajectory.seed for trajectory in collected(env, tmp_path / "demos", 3, **options)]
    assert kept[-1] > 2, "no seed failed"
    again = Recorded()
    more = [trajectory.seed for trajectory in collected(again, tmp_path / "demos", 4, **options)]
    assert more[:3] == kept and all(seed > kept[-1] for seed in again.seeds)


def test_successes_only_and_the_same_twice(env, tmp_path):
    noisy = [collected(env, tmp_path / name, 4, noise=0.3, successes_only=True) for name in ("a", "b")]
    assert len(noisy[0]) == 4 and all(trajectory.success_once for trajectory in noisy[0])
    assert [trajectory.seed for trajectory in noisy[0]] == [trajectory.seed for trajectory in noisy[1]]
    assert all(torch.equal(one.actions, two.actions) for one, two in zip(*noisy, strict=True))
    seeds, notes = stored_settings(tmp_path / "a")
    assert seeds == [trajectory.seed for trajectory in noisy[0]] and notes[0]["collection"]["noise"] == 0.3


def test_a_hopeless_collection_gives_up(env, tmp_path):
    actor = load_actor("random", TASK)
    with pytest.raises(RuntimeError, match=r"only 0 of \d+ episodes succeeded"):
        collect_dataset(env, actor.make, tmp_path / "demos", PLAN, episodes=1, successes_only=True)


@pytest.mark.parametrize(
    ("policy", "task", "noise", "message"),
    [
        ("expert", "StackCub-v1", 0.0, "Did you mean 'StackCube-v1'"),
        ("random", TASK, 0.1, "`noise` must be 0 unless the expert acts"),
        ("expert", TASK, 1.5, r"`noise` must be in \[0, 1\], got 1.5"),
    ],
)
def test_actors_that_cannot_be(policy, task, noise, message):
    with pytest.raises(ValueError, match=message):
        load_actor(policy, task, noise=noise)


def test_no_episodes(env, tmp_path):
    with pytest.raises(ValueError, match="`episodes` must be at least 1, got 0"):
        collected(env, tmp_path / "demos", 0)
    with pytest.raises(ValueError, match="`episodes_per_seed` must be at least 1, got 0"):
        collected(env, tmp_path / "demos", 1, episodes_per_seed=0)


@pytest.mark.parametrize(("repeats", "selects"), [(1, False), (1, True), (3, False)])
def test_what_the_simulator_spoiled_is_left_out_once(tmp_path, caplog, repeats, selects):
    def collect(episodes, **options):
        env = SpoiledEnv(0, 3)
        collect_dataset(
            env, lambda _: to_the_middle, tmp_path / "rollouts", TOY_PLAN, episodes=episodes, episodes_per_seed=repeats,
            successes_only=selects, progress=False, **options,
        )  # fmt: skip
        return env.played, [one.seed for one in load_trajectories(tmp_path / "rollouts")]

    def interrupt(trajectory):
        if trajectory.seed == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        collect(4 * repeats, on_episode=interrupt)
    assert "rollouts: an episode of seed 3 is left out, whose state was not finite at step 2" in caplog.text
    played, seeds = collect(4 * repeats)
    assert seeds == [seed for seed in (1, 2, 4, 5) for _ in range(repeats)] and 3 not in played
    assert collect(4 * repeats)[0] == []
    played, seeds = collect(5 * repeats)
    assert seeds == [seed for seed in (1, 2, 4, 5, 6) for _ in range(repeats)] and set(played) <= {6, 7}


def test_a_simulator_that_spoils_everything_is_given_up(tmp_path):
    with pytest.raises(RuntimeError, match=r"only 0 of \d+ episodes were finite"):
        collect_dataset(SpoiledEnv(*range(99)), lambda _: to_the_middle, tmp_path / "all", TOY_PLAN, episodes=2)


def to_the_middle(obs, signals):
    actions = -obs.state[:, None].sign()
    return Decision(actions, actions)


def test_interrupted_again_and_again_no_episode_is_played_twice(tmp_path):
    """A block that begins with the same episode has the same random numbers: another repeat of its seed must not meet them."""
    torch.manual_seed(0)
    policy = TokenPolicy.create_tiny(STATS, image_size=16, chunk_size=1, action_dim=1, num_bins=401, state_size=1)

    def collect(**options):
        make = partial(policy_actor, policy, temperature=1.0)
        collect_dataset(
            ToyEnv(num_envs=8), lambda generator: make(generator=generator), tmp_path / "rollouts", TOY_PLAN, episodes=24,
            episodes_per_seed=6, progress=False, **options,
        )  # fmt: skip

    def interrupt(trajectory):
        told.append(trajectory)
        if len(told) == 2:
            raise Interrupted

    for _ in range(6):
        told = []
        with pytest.raises(Interrupted):
            collect(on_episode=interrupt)
    collect()
    played = [(t.seed, *t.trace.flatten().tolist()) for t in load_trajectories(tmp_path / "rollouts")]
    assert len(played) == len(set(played)) == 24
