"""Paired statistics against published and closed values, and what may be compared at all."""

import copy
from dataclasses import replace

import pytest

from trl_stare.evaluation import (
    PlayedEpisode,
    build_eval_info,
    check_comparable,
    compare,
    comparison_table,
    episodes_needed,
    eval_results,
    eval_table,
    paired_difference,
    task_metrics,
)
from trl_stare.evaluation.records import EpisodeResult
from trl_stare.stages import Segment


def outcomes(both, only_a, only_b, neither):
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


def episode(seed, solved, *, at_end=None, task="PushCube-v1", void="", reached_second=True):
    segments = [Segment(0, 0, 5, reached_second or solved, 0.1)]
    if segments[0].passed:
        segments.append(Segment(1, 5, 9, solved, 0.2))
    at_end = solved if at_end is None else at_end
    result = EpisodeResult(seed, solved, at_end, 9, False, True, tuple(segments))
    return PlayedEpisode(task, 0, result, void)


def info(rows, **changes):
    environment = {"sim_backend": "physx_cpu", "render_backend": "sapien_cpu", "visuals": "light"}
    environment |= {"max_episode_steps": 9}
    events = changes.pop("events", {"Reach": "touched", "Push": "succeeded"})
    settings = {"success_rule": "success_once", "temperature": 1.0, **changes.pop("settings", {})}
    metrics = task_metrics(rows, events, rule=settings["success_rule"], environment=environment | changes)
    return build_eval_info(
        policy={"name": "p", "revision": None, "files": {}},
        settings=settings,
        group="g",
        episodes={"PushCube-v1": rows},
        metrics={"PushCube-v1": metrics},
    )


def test_newcombes_interval():
    # Fagerland, Lydersen, Laake (2014): airway hyper-responsiveness, 21 pairs: -0.286 [-0.507, -0.026]
    found = paired_difference(*outcomes(1, 7, 1, 12))
    assert found == pytest.approx((-6 / 21, -0.507, -0.026), abs=5e-4)
    mirrored = paired_difference(*outcomes(1, 1, 7, 12))
    assert mirrored == pytest.approx((-found.value, -found.high, -found.low))


def test_newcombes_interval_where_nothing_varies():
    # all solved by both: rates 1 [w, 1], no correlation, so -(1 - w) .. 1 - w
    found = paired_difference([True] * 10, [True] * 10)
    assert found.value == 0 and found.high == -found.low == pytest.approx(0.2775, abs=1e-4)


def test_pairing_narrows_the_interval():
    alike, unlike = paired_difference(*outcomes(40, 0, 10, 50)), paired_difference(*outcomes(20, 20, 30, 30))
    assert alike.value == unlike.value == 0.1 and alike.low > 0 > unlike.low


def test_episodes_needed():
    # p = 0.4, d = 0.1: ((1.959964 sqrt(0.4) + 0.841621 sqrt(0.39)) / 0.1)^2 = 311.9
    assert episodes_needed(0.4, 0.1) == episodes_needed(0.4, -0.1) == 312
    with pytest.raises(ValueError, match="not 0"):
        episodes_needed(0.4, 0.0)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((5, 1, 12, 6), "B is better (n = 24, p = 0.0034)"),
        ((5, 12, 1, 6), "A is better (n = 24, p = 0.0034)"),
        ((10, 3, 5, 6), "not distinguishable at n = 24, you need about 375 episodes if the difference is as it seems"),
        # five cannot be enough, whatever Connor's formula says of few episodes (four)
        ((0, 0, 5, 0), "not distinguishable at n = 5, you need about 6 episodes if the difference is as it seems"),
        ((0, 0, 6, 0), "B is better (n = 6, p = 0.031)"),
        (
            (10, 3, 3, 8),
            "not distinguishable at n = 24, and no difference was seen; "
            "to find one of 5 points you need about 783 episodes",
        ),
        (
            (300, 0, 0, 0),
            "not distinguishable at n = 300, and no difference was seen; one of 5 points would most likely have been",
        ),
    ],
)
def test_verdicts(counts, verdict):
    a, b = ([episode(seed, solved) for seed, solved in enumerate(each)] for each in outcomes(*counts))
    found = compare(a, b[::-1], {"PushCube-v1": ("Reach", "Push")})
    assert list(found) == ["PushCube-v1"]
    success, reach, push = found["PushCube-v1"]
    assert success.verdict == verdict and verdict in comparison_table(found)
    assert (push.a, push.b, push.test) == (success.a, success.b, success.test) and reach.a.rate == reach.b.rate == 1


def test_only_common_starts_that_nothing_spoiled_are_compared():
    a = [episode(1, True), episode(2, True), episode(3, False), episode(1, True, task="PullCube-v1")]
    b = [episode(4, True), episode(3, True), episode(2, False, void="x"), episode(1, False, task="PullCube-v1")]
    found = compare(a, b, {"PushCube-v1": ("Reach", "Push"), "PullCube-v1": ("Reach", "Pull")})
    assert [(task, rows[0].a.n, rows[0].test[:2]) for task, rows in found.items()] == [
        ("all tasks", 2, (1, 1)),
        ("PushCube-v1", 1, (1, 0)),
        ("PullCube-v1", 1, (0, 1)),
    ]
    with pytest.raises(ValueError, match="none in common"):
        compare(a[:1], b[:1], {})


def test_stages_of_other_plans_are_compared_by_name():
    """B's plan has a stage between the two of A's, which its episodes passed where they reached it."""
    a = [episode(0, True), episode(1, False)]
    b = [episode(0, True), episode(1, False)]
    for index, row in enumerate(b):
        reach, *push = row.result.segments
        parts = (reach, Segment(1, 5, 5, True, 0.0), *(part._replace(stage=2) for part in push))
        b[index] = replace(row, result=replace(row.result, segments=parts))
    names, b_names = {"PushCube-v1": ("Reach", "Push")}, {"PushCube-v1": ("Reach", "Grasp", "Push")}
    success, reach, push = compare(a, b, names, b_stage_names=b_names)["PushCube-v1"]
    assert (reach.what, push.what) == ("passed Reach", "passed Push")
    assert (push.a, push.b) == (success.a, success.b) and push.test == success.test


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"settings": {"temperature": 0.0}}, "temperature"),
        ({"settings": {"success_rule": "success_at_end"}}, "success_rule"),
        ({"sim_backend": "physx_cuda"}, "sim_backend"),
        ({"render_backend": "sapien_cuda"}, "render_backend"),
        ({"visuals": "stock"}, "visuals"),
        ({"variation": "camera/shift"}, "variation"),
        ({"max_episode_steps": 10}, "max_episode_steps"),
        ({"events": {"Reach": "touched_near(radius=0.02)", "Push": "succeeded"}}, "stage_events"),
    ],
)
def test_other_conditions_are_refused_by_name_unless_allowed(changes, name):
    rows = [episode(1, True), episode(2, False)]
    a, b = info(rows), info(rows, **changes)
    assert check_comparable(a, copy.deepcopy(a)) == []
    with pytest.raises(ValueError, match=rf"got other {name}: .* `--allow {name}`"):
        check_comparable(a, b)
    (allowed,) = check_comparable(a, b, [name])
    assert allowed.startswith(name)


def test_other_seeds_and_unknown_conditions_are_refused():
    a, b = info([episode(1, True)]), info([episode(2, True)])
    with pytest.raises(ValueError, match="got other seeds: .*'1'.*'2'"):
        check_comparable(a, b)
    with pytest.raises(ValueError, match="`allow` must be among tasks, .* got colour"):
        check_comparable(a, b, ["colour"])


def test_the_numbers_of_an_evaluation():
    rows = [
        episode(1, True),
        episode(2, False),
        episode(3, False, reached_second=False),
        episode(5, True, at_end=False),
    ]
    found = info([*rows, episode(9, False, void="nan")], settings={"success_rule": "success_at_end"})
    metrics = found["per_task"][0]["metrics"]
    assert (metrics["n_episodes"], metrics["n_success"], metrics["pc_success"], metrics["n_voided"]) == (4, 1, 25.0, 1)
    assert metrics["pc_success_ci95"] == pytest.approx([4.56, 69.94], abs=0.01)
    assert (metrics["success_once"], metrics["success_at_end"]) == (0.5, 0.25)
    assert metrics["eval_seeds"] == {"0": "1-3, 5, 9"}
    assert [(s["reached"], s["passed"]) for s in metrics["stages"].values()] == [(4, 3), (3, 2)]
    assert found["overall"]["pc_success"] == found["overall"]["pc_success_task_mean"] == 25.0
    assert found["per_group"] == {"g": found["overall"]}
    assert "| PushCube-v1 | 4 | 50.0 % [15.0, 85.0] | 25.0 % [4.6, 69.9] |" in eval_table(found)
    assert eval_table(found).endswith("; temperature 1.0.")
    found["settings"]["temperature"] = None  # a demonstrator has none
    assert eval_table(found).endswith("Success rule: success_at_end.")
    assert [(r.metric_type, r.metric_value) for r in eval_results(found)] == [
        ("success_once", 0.5),
        ("success_at_end", 0.25),
    ]
