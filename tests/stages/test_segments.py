import pytest
import torch

from trl_stare.stages import Segment, Stage, StagePlan, segment, stage_per_step, stage_success, succeeded


def make_plan():
    """Three stages whose events and distances are signals of their own."""
    first = Stage(
        name="A", done=lambda s: s["a"], distance=lambda s: s["d"], scale=0.5, cost_scale=1.0, reads=("a", "d")
    )
    second = Stage(name="B", done=lambda s: s["b"], distance=lambda s: s["d"], scale=0.5, reads=("b", "d"))
    last = Stage(name="C", done=succeeded, distance=lambda s: s["d"], scale=0.5, reads=("success", "d"))
    return StagePlan("Abc-v0", (first, second, last))


PLAN = make_plan()


def make_signals(a, b, success, d=None):
    flags = {name: torch.tensor([c == "x" for c in text]) for name, text in (("a", a), ("b", b), ("success", success))}
    return flags | {"d": torch.arange(len(a), dtype=torch.float32) if d is None else torch.tensor(d)}


# one character per row of the signals, x where the event holds; d is the row's index, so costs can be read off
TABLE = [
    # a          b          success    (stage, start, stop, passed, cost)...
    ("..xx..", "....x.", ".....x", [(0, 0, 2, True, 1.5), (1, 2, 4, True, 7.0), (2, 4, 5, True, 10.0)]),
    ("......", "......", "......", [(0, 0, 5, False, 3.0)]),
    ("......", ".x....", "......", [(0, 0, 5, False, 3.0)]),  # b before a counts for nothing
    ("..x...", "......", "......", [(0, 0, 2, True, 1.5), (1, 2, 5, False, 8.0)]),  # a is lost again: still passed
    ("..x...", "..x...", "......", [(0, 0, 2, True, 1.5), (1, 2, 2, True, 0.0), (2, 2, 5, False, 8.0)]),  # empty
    ("......", "......", "...x..", [(0, 0, 3, True, 2.0), (1, 3, 3, True, 0.0), (2, 3, 3, True, 0.0)]),  # success only
    (".....x", "......", "......", [(0, 0, 5, True, 3.0), (1, 5, 5, False, 0.0)]),  # reached with the last step
    (
        "x.....",
        ".x....",
        "..x..x",
        [(0, 0, 0, True, 0.0), (1, 0, 1, True, 2.0), (2, 1, 2, True, 4.0)],
    ),  # a holds at once
]


@pytest.mark.parametrize(("a", "b", "success", "expected"), TABLE)
def test_segments(a, b, success, expected):
    segments = segment(PLAN, make_signals(a, b, success))
    assert segments == tuple(Segment(*row) for row in expected)


def random_signals(seed):
    generator = torch.Generator().manual_seed(seed)
    rates = {"a": 0.1, "b": 0.1, "success": 0.03}
    signals = {name: torch.rand(30, generator=generator) < rate for name, rate in rates.items()}
    return signals | {"d": torch.rand(30, generator=generator)}


@pytest.mark.parametrize("seed", range(50))
def test_invariants(seed):
    signals = random_signals(seed)
    segments = segment(PLAN, signals)
    assert [part.stage for part in segments] == list(range(len(segments)))
    assert segments[0].start == 0
    for before, after in zip(segments, segments[1:], strict=False):
        assert before.passed
        assert before.stop == after.start
    assert all(part.start <= part.stop <= 29 and part.cost >= 0 for part in segments)
    finished = segments[-1].stage == 2 and segments[-1].passed
    assert finished == bool(signals["success"].any())
    if finished:
        assert segments[-1].stop == int(torch.nonzero(signals["success"])[0])
    else:
        assert segments[-1].stop == 29


@pytest.mark.parametrize("seed", range(20))
def test_stepwise_labelling_equals_whole_trajectory(seed):
    """What an online observer knows after each row: the latched stage grows as `segment` says in hindsight."""
    signals = random_signals(seed)
    expected = stage_per_step(segment(PLAN, signals), 29).tolist()
    stage, labels = 0, []
    for row in range(30):
        exits = PLAN.exits({name: value[row] for name, value in signals.items()}).tolist()
        while stage < 3 and exits[stage]:
            stage += 1
        labels.append(stage if stage < 3 else -1)
    assert labels[:-1] == expected


def test_later_rows_do_not_change_earlier_segments():
    signals = make_signals("..x...", "....x.", "......")
    longer = {name: torch.cat([value, value.flip(0)]) for name, value in signals.items()}
    assert segment(PLAN, longer)[:2] == segment(PLAN, signals)[:2]


def test_cost_uses_each_stages_own_scale():
    signals = make_signals("..x..", "....x", ".....", d=[9.0, 1.0, 3.0, 0.5, 0.25])
    first, second = segment(PLAN, signals)[:2]
    assert first.cost == 2.0  # (1 + 3) / 2 / 1.0, without row 0
    assert second.cost == 0.75  # (0.5 + 0.25) / 2 / 0.5


@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_refuses_what_is_not_one_trajectory(shape):
    signals = {name: torch.zeros(shape, dtype=torch.bool) for name in ("a", "b", "success")} | {
        "d": torch.zeros(shape)
    }
    with pytest.raises(ValueError, match="one trajectory"):
        segment(PLAN, signals)


def test_stage_per_step():
    segments = segment(PLAN, make_signals("..xx..", "..x.x.", "...x.."))
    assert stage_per_step(segments, 5).tolist() == [0, 0, 2, -1, -1]
    assert stage_per_step(segment(PLAN, make_signals("..x...", "......", "......")), 5).tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="`num_steps` must be at least"):
        stage_per_step(segments, 2)


def test_stage_success_counts():
    trajectories = [segment(PLAN, make_signals(*row[:3])) for row in TABLE]
    assert stage_success(trajectories, 3) == ((6, 8), (4, 6), (3, 4))
    assert stage_success([], 2) == ((0, 0), (0, 0))
    with pytest.raises(ValueError, match="`num_stages` must cover"):
        stage_success(trajectories, 2)
