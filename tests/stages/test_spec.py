import math
from functools import partial

import pytest
import torch

from trl_stare.stages import Stage, StagePlan, succeeded


def make_stage(name="Walk", done=lambda s: s["here"], reads=("here", "gap"), **kwargs):
    return Stage(name=name, done=done, distance=lambda s: s["gap"][..., 0], scale=0.5, reads=reads, **kwargs)


LAST = make_stage("Sit", done=succeeded, reads=("gap", "success"))
PLAN = StagePlan("Bench-v0", (make_stage("Walk", cost_scale=1.0), make_stage("Turn"), LAST))


def make_signals(gap, here, success):
    return {
        "gap": torch.tensor(gap).unsqueeze(-1),
        "here": torch.tensor(here, dtype=torch.bool),
        "success": torch.tensor(success, dtype=torch.bool),
    }


SIGNALS = make_signals(gap=[1.0, 0.5, 0.0, 0.2], here=[0, 0, 1, 0], success=[0, 0, 0, 1])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_names_length_and_reads():
    assert PLAN.names == ("Walk", "Turn", "Sit")
    assert len(PLAN) == 3
    assert PLAN.reads == ("here", "gap", "success")


def within(signals, radius):
    return signals["gap"][..., 0] <= radius


class Near:
    def __call__(self, signals):
        return signals["here"]


@pytest.mark.parametrize(
    ("done", "name"),
    [
        (within, "within"),
        (partial(within, radius=0.02), "within(radius=0.02)"),
        (partial(partial(within, radius=0.3), None), "within(None, radius=0.3)"),
        (lambda s: s["here"], "<lambda>"),
        (Near(), "Near"),
    ],
)
def test_events_have_names_and_thresholds(done, name):
    plan = StagePlan("Bench-v0", (make_stage("Walk", done=done), LAST))
    assert plan.event_names == {"Walk": name, "Sit": "succeeded"}


def test_exits_distances_and_costs():
    # Walk and Turn share one event, so it passes both; success implies every exit
    assert PLAN.exits(SIGNALS).tolist() == [[False] * 3, [False] * 3, [True, True, False], [True] * 3]
    assert torch.equal(PLAN.distances(SIGNALS), torch.tensor([[1.0] * 3, [0.5] * 3, [0.0] * 3, [0.2] * 3]))
    torch.testing.assert_close(PLAN.costs(SIGNALS)[0], torch.tensor([1.0, 2.0, 2.0]))


def test_current_stage_is_the_last_exit_that_holds():
    current = PLAN.current_stage(SIGNALS)
    assert current.tolist() == [0, 0, 2, 3]
    assert current.dtype == torch.int64


def test_potential_closed_forms():
    one = sigmoid(1.0)
    progress = [sigmoid(1 - 1.0 / 0.5) / one, sigmoid(0.0) / one, 1.0, 1.0]
    staged = [progress[0] / 3, progress[1] / 3, 1.0, 1.0]
    literal = [sigmoid(-1.0), 0.5, one, one]
    torch.testing.assert_close(PLAN.progress(SIGNALS), torch.tensor(progress))
    torch.testing.assert_close(PLAN.potential(SIGNALS), torch.tensor(staged))
    torch.testing.assert_close(PLAN.potential(SIGNALS, form="literal"), torch.tensor(literal))


def test_literal_potential_drops_where_a_stage_begins_and_staged_does_not():
    plan = StagePlan("Bench-v0", (make_stage(), LAST))
    signals = make_signals(gap=[0.01, 2.0], here=[0, 1], success=[0, 0])
    literal, staged = plan.potential(signals, form="literal"), plan.potential(signals)
    assert literal[1] < literal[0]
    assert staged[1] > staged[0]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 4)])
def test_every_leading_shape(shape):
    generator = torch.Generator().manual_seed(0)
    signals = {
        "gap": torch.rand(*shape, 1, generator=generator),
        "here": torch.rand(shape, generator=generator) < 0.5,
        "success": torch.rand(shape, generator=generator) < 0.2,
    }
    assert PLAN.exits(signals).shape == (*shape, 3)
    for value in (PLAN.current_stage(signals), PLAN.progress(signals), PLAN.potential(signals)):
        assert value.shape == shape
    potential, success = PLAN.potential(signals), signals["success"]
    assert ((potential > 0) & (potential <= 1)).all()
    assert (potential[success] == 1).all()


def test_batched_equals_one_by_one():
    generator = torch.Generator().manual_seed(1)
    signals = {
        "gap": torch.rand(50, 1, generator=generator) * 3,
        "here": torch.rand(50, generator=generator) < 0.5,
        "success": torch.rand(50, generator=generator) < 0.2,
    }
    rows = [{name: value[i] for name, value in signals.items()} for i in range(50)]
    assert PLAN.current_stage(signals).tolist() == [PLAN.current_stage(row).item() for row in rows]
    torch.testing.assert_close(PLAN.potential(signals), torch.stack([PLAN.potential(row) for row in rows]))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((LAST,), "tuple of two or more"),
        ([make_stage(), LAST], "tuple of two or more"),
        ((make_stage("Sit"), LAST), "different names"),
        ((make_stage(), make_stage("Sit")), "only the environment says"),
        # even a rule that gives the same answer is refused: a plan has no say in what success is
        (
            (make_stage(), make_stage("Sit", done=lambda s: s["success"], reads=("success",))),
            "only the environment says",
        ),
        ((make_stage(), make_stage("Sit", done=succeeded, reads=("gap",))), "only the environment says"),
    ],
)
def test_invalid_plans(stages, message):
    with pytest.raises(ValueError, match=message):
        StagePlan("Bench-v0", stages)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["scale", "cost_scale"])
def test_scales_are_positive_and_finite(field, value):
    arguments = {"scale": 1.0, field: value}
    with pytest.raises(ValueError, match=f"`{field}` of stage 'Walk' must be positive and finite"):
        Stage(name="Walk", done=succeeded, distance=lambda s: s["gap"], reads=("gap",), **arguments)


@pytest.mark.parametrize(("factor", "nearness"), [(1.0, 0.0), (0.25, -3.0), (4.0, 0.75)])
def test_a_smaller_scale_makes_the_potential_steeper_and_changes_nothing_else(factor, nearness):
    """One `L_k` from the end of the first of three stages: `1 - d / L` is 0, -3 and 0.75."""
    plan, row = PLAN.rescaled(factor), make_signals(gap=[0.5], here=[0], success=[0])
    expected = 1 / (1 + math.exp(-nearness)) * (1 + math.exp(-1)) / 3
    assert plan.potential(row).item() == pytest.approx(expected)
    for name in ("costs", "distances", "events", "current_stage"):
        assert torch.equal(getattr(plan, name)(SIGNALS), getattr(PLAN, name)(SIGNALS)), name


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_factor_is_positive_and_finite(factor):
    with pytest.raises(ValueError, match="`factor` must be positive and finite"):
        PLAN.rescaled(factor)


def test_validate_signals_names_missing_and_known():
    PLAN.validate_signals(("gap", "here", "success", "other"))
    with pytest.raises(ValueError, match=r"\['here'\] are missing; known are \['gap', 'success'\]"):
        PLAN.validate_signals(("gap", "success"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gap", torch.tensor([[1.0], [math.nan]]), r"`signals\['gap'\]` of task 'Bench-v0' .* nan at index \[1, 0\]"),
        ("gap", torch.tensor([[math.inf], [1.0]]), r"inf at index \[0, 0\]"),
        ("gap", torch.ones(3, 1), r"`signals\['gap'\]` must have the shape of 'success', \[2\]"),
        ("gap", torch.ones(2, 1, 1), r"at most one dimension more"),
        ("here", torch.ones(1, dtype=torch.bool), r"`signals\['here'\]` must have the shape"),
        ("success", torch.zeros(2), r"`signals\['success'\]` must be bool, got torch.float32"),
    ],
)
def test_bad_signals_are_named(name, value, message):
    signals = make_signals(gap=[1.0, 1.0], here=[0, 0], success=[0, 0]) | {name: value}
    for method in (PLAN.exits, PLAN.current_stage, PLAN.potential, PLAN.distances):
        with pytest.raises(ValueError, match=message):
            method(signals)


def test_a_missing_signal_is_named():
    signals = make_signals(gap=[1.0], here=[0], success=[0])
    del signals["gap"]
    with pytest.raises(ValueError, match=r"\['gap'\] are missing"):
        PLAN.exits(signals)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        # a comparison of a [N, 1] signal: would broadcast to [N, N] with a [N] one
        (make_stage(done=lambda s: s["gap"] < 1), r"`done` of stage 'Walk' .* must return shape \[2\], got \[2, 1\]"),
        (make_stage(done=lambda s: s["gap"][..., 0]), "`done` of stage 'Walk' .* must return bool"),
        (make_stage(done=lambda s: s["secret"]), r"`reads` of stage 'Walk' must contain 'secret'"),
    ],
)
def test_bad_events_are_named(stage, message):
    signals = make_signals(gap=[1.0, 1.0], here=[0, 0], success=[0, 0]) | {"secret": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        StagePlan("Bench-v0", (stage, LAST)).exits(signals)


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (lambda s: s["gap"], r"must return shape \[2\], got \[2, 1\]"),
        (lambda s: s["gap"][..., 0] - 2.0, "must be finite and >= 0"),
        (lambda s: s["gap"][..., 0] / 0.0, "must be finite and >= 0"),
    ],
)
def test_bad_distances_are_named(distance, message):
    stage = Stage(name="Walk", done=lambda s: s["here"], distance=distance, scale=0.5, reads=("here", "gap"))
    signals = make_signals(gap=[1.0, 1.0], here=[0, 0], success=[0, 0])
    with pytest.raises(ValueError, match="`distance` of stage 'Walk'.*" + message):
        StagePlan("Bench-v0", (stage, LAST)).potential(signals)


def test_unknown_form_lists_the_known():
    with pytest.raises(ValueError, match=r"'staged', 'literal'.*got 'fancy'"):
        PLAN.potential(SIGNALS, form="fancy")
