"""Episode rows and their summary, from signals whose stages can be read off by eye."""

import json

import pytest
import torch

from trl_stare.data.trajectory import Trajectory
from trl_stare.evaluation import EpisodeResult, PhaseResult, paired, read_episodes, write_episodes
from trl_stare.stages import Segment, Stage, StagePlan, succeeded

PLAN = StagePlan(
    "Ab-v0",
    (
        Stage(name="A", done=lambda s: s["a"], distance=lambda s: s["d"], scale=1.0, reads=("a", "d")),
        Stage(name="B", done=succeeded, distance=lambda s: s["d"], scale=1.0, reads=("success", "d")),
    ),
)


def make_trajectory(seed: int, a: str, success: str) -> Trajectory:
    """One character per moment, x where the event holds; the distance is the moment's index."""
    flags = {name: torch.tensor([c == "x" for c in text]) for name, text in (("a", a), ("success", success))}
    steps = len(a) - 1
    return Trajectory(
        task="Ab-v0",
        instruction="a, then b",
        seed=seed,
        policy="test",
        images=torch.zeros(1, 2, 2, 3, dtype=torch.uint8),
        state=torch.zeros(1, 1),
        starts=torch.zeros(1, dtype=torch.int64),
        actions=torch.zeros(steps, 1),
        labels=torch.zeros(steps, 1),
        trace=None,
        logps=None,
        features=None,
        final_image=torch.zeros(2, 2, 3, dtype=torch.uint8),
        final_state=torch.zeros(1),
        signals=flags | {"d": torch.arange(steps + 1, dtype=torch.float32)},
        reward=torch.zeros(steps),
        terminated=False,
        truncated=True,
    )


TABLE = [
    # a        success  once   at_end  segments
    ("..xx.", "...xx", True, True, [(0, 0, 2, True, 1.5), (1, 2, 3, True, 3.0)]),
    ("..xx.", "...x.", True, False, [(0, 0, 2, True, 1.5), (1, 2, 3, True, 3.0)]),  # solved, then undone
    (".x...", ".....", False, False, [(0, 0, 1, True, 1.0), (1, 1, 4, False, 3.0)]),
    (".....", ".....", False, False, [(0, 0, 4, False, 2.5)]),
]
EPISODES = [
    EpisodeResult.from_trajectory(make_trajectory(seed, a, success), PLAN)
    for seed, (a, success, *_) in enumerate(TABLE)
]


def summarise(episodes: list[EpisodeResult]) -> PhaseResult:
    return PhaseResult.from_episodes(episodes, PLAN.names, temperature=0.6, max_episode_steps=4, wall_s=2.5)


@pytest.mark.parametrize(("episode", "row"), list(zip(EPISODES, TABLE, strict=True)))
def test_an_episode_is_read_off_its_signals(episode, row):
    _, _, once, at_end, segments = row
    assert (episode.success_once, episode.success_at_end, episode.num_steps) == (once, at_end, 4)
    assert (episode.terminated, episode.truncated) == (False, True)
    assert episode.segments == tuple(Segment(*values) for values in segments)


def test_the_summary_counts_rules_and_stages_apart():
    result = summarise(EPISODES)
    assert (result.n_episodes, result.success_once, result.success_at_end) == (4, 0.5, 0.25)
    assert result.stages == {"A": (3, 4), "B": (2, 3)}
    assert result.stage_success == {"A": 0.75, "B": 2 / 3}
    assert result.success_once_ci95 == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert (result.eval_seeds, result.eval_env_steps, result.eval_wall_s) == ((0, 1, 2, 3), 16, 2.5)


def test_a_stage_that_nobody_reached_has_no_rate():
    assert summarise([EPISODES[3]]).stage_success == {"A": 0.0, "B": None}


def test_the_dictionary_has_the_published_fields_first_and_is_json():
    given = summarise(EPISODES).for_phase(checkpoint="imitation", env_steps=1000, wall_s=60.0).to_dict()
    assert list(given)[:10] == [
        "checkpoint",
        "n_episodes",
        "success_once",
        "success_once_ci95",
        "success_at_end",
        "success_at_end_ci95",
        "stage_success",
        "eval_seeds",
        "env_steps",
        "wall_s",
    ]
    assert json.loads(json.dumps(given)) == given
    assert (given["checkpoint"], given["env_steps"], given["wall_s"]) == ("imitation", 1000, 60.0)
    assert (given["temperature"], given["stage_counts"]) == (0.6, {"A": [3, 4], "B": [2, 3]})


def test_no_episodes_are_no_result():
    with pytest.raises(ValueError, match="at least one episode"):
        summarise([])


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "deep" / "episodes.jsonl"
    write_episodes(path, EPISODES)
    assert read_episodes(path) == EPISODES
    assert len(path.read_text().splitlines()) == 4
    assert [file.name for file in path.parent.iterdir()] == ["episodes.jsonl"]


@pytest.mark.parametrize("line", ['{"seed": 3', '{"seed": 3}', "[1, 2]", '{"seed": 1, "segments": [], "steps": 4}'])
def test_a_broken_row_is_named(tmp_path, line):
    path = tmp_path / "episodes.jsonl"
    write_episodes(path, EPISODES)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 5"):
        read_episodes(path)


def test_a_cost_that_is_no_number_is_not_written(tmp_path):
    path = tmp_path / "episodes.jsonl"
    write_episodes(path, EPISODES)
    before = path.read_text()
    broken = EpisodeResult(9, False, False, 4, False, True, (Segment(0, 0, 4, False, float("nan")),))
    with pytest.raises(ValueError, match="JSON"):
        write_episodes(path, [broken])
    assert path.read_text() == before


def test_pairing_follows_the_seeds_not_the_order():
    a, b = paired(EPISODES, EPISODES[::-1])
    assert a == b == [True, True, False, False]


def test_what_is_void_in_one_evaluation_is_left_out_of_both():
    many = [EpisodeResult(seed, seed % 2 == 0, False, 4, False, True, ()) for seed in range(200)]
    a, b = paired(many[1:], many[:-2])
    assert a == b == [seed % 2 == 0 for seed in range(1, 198)]
    assert len(paired(many, many[4:])[0]) == 196  # two of a hundred
    with pytest.raises(ValueError, match="5 that only one of them played"):
        paired(many, many[5:])
    # and one of however few
    assert paired(EPISODES, EPISODES[1:]) == ([True, False, False], [True, False, False])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (EPISODES, EPISODES[2:], r"2 that only one of them played \(e.g. 0\)"),
        (EPISODES[:1], [], "1 that only one"),
        (EPISODES[:2], EPISODES[2:], "4 that only one"),
        (EPISODES, [*EPISODES, EPISODES[0]], "`b` must hold each seed once, got 1"),
    ],
)
def test_other_seeds_are_not_paired(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired(a, b)
