"""Requests: read field by field, with errors that say what was wrong."""

import numpy as np
import pytest
import torch

from trl_stare.serving import Limits, read_request

LIMITS = Limits(max_rows=4, max_pixels=16, max_characters=10)
IMAGE = np.zeros((8, 12, 3), np.uint8)
STATE = np.arange(3.0)
GOOD = {"image": IMAGE, "state": STATE, "instruction": "stack"}


def rows(n):
    return {"image": np.zeros((n, 8, 12, 3), np.uint8), "state": np.zeros((n, 3)), "instruction": "stack"}


def test_one_observation_and_several():
    one = read_request(GOOD, LIMITS, 3)
    assert one.single and one.obs.images.shape == (1, 8, 12, 3) and one.obs.instructions == ("stack",)
    assert torch.equal(one.obs.state, torch.tensor([[0.0, 1.0, 2.0]]))
    assert (one.temperature, one.reset, one.seed) == (None, False, None)
    two = read_request(rows(2) | {"instruction": ["a", "b"], "temperature": 0, "reset": True, "seed": 5}, LIMITS, 3)
    assert not two.single and two.obs.instructions == ("a", "b") and two.obs.state.dtype == torch.float32
    assert (two.temperature, two.reset, two.seed) == (0.0, True, 5)


def test_openpis_names():
    renamed = {"observation/image": IMAGE, "observation/state": STATE, "prompt": "stack"}
    theirs, ours = read_request(renamed, LIMITS).obs, read_request(GOOD, LIMITS).obs
    assert torch.equal(theirs.images, ours.images) and torch.equal(theirs.state, ours.state)
    assert theirs.instructions == ours.instructions


@pytest.mark.parametrize(
    ("cameras", "image", "wrist", "seen", "single"),
    [
        (1, [8, 12, 3], None, [1, 8, 12, 3], True),
        (1, [2, 8, 12, 3], None, [2, 8, 12, 3], False),
        (2, [2, 8, 12, 3], None, [1, 2, 8, 12, 3], True),
        (2, [4, 2, 8, 12, 3], None, [4, 2, 8, 12, 3], False),
        (2, [8, 12, 3], [8, 12, 3], [1, 2, 8, 12, 3], True),
        (2, [4, 8, 12, 3], [4, 8, 12, 3], [4, 2, 8, 12, 3], False),
        (3, [3, 8, 12, 3], None, [1, 3, 8, 12, 3], True),
        (None, [8, 12, 3], None, [1, 8, 12, 3], True),
        (None, [2, 8, 12, 3], None, [2, 8, 12, 3], False),
        (None, [4, 2, 8, 12, 3], None, [4, 2, 8, 12, 3], False),
        (None, [8, 12, 3], [8, 12, 3], [1, 2, 8, 12, 3], True),
    ],
)
def test_what_the_policy_looks_through_says_what_a_dimension_is(cameras, image, wrist, seen, single):
    given = {"observation/image": np.full(image, 1, np.uint8), "prompt": "stack"}
    if wrist is not None:
        given["observation/wrist_image"] = np.full(wrist, 2, np.uint8)
    request = read_request(given, LIMITS, num_cameras=cameras)
    assert ([*request.obs.images.shape], request.single) == (seen, single)
    assert len(request.obs.instructions) == seen[0]
    if wrist is not None:
        assert (request.obs.images[:, 0] == 1).all() and (request.obs.images[:, 1] == 2).all()


@pytest.mark.parametrize(
    ("cameras", "image", "wrist", "error"),
    [
        (1, [1, 2, 8, 12, 3], None, r"uint8, \[H, W, 3\] or \[N, H, W, 3\], got uint8 \[1, 2, 8, 12, 3\]"),
        (1, [8, 12, 3], [8, 12, 3], "`wrist_image` must be left out.*looks through one camera"),
        (2, [8, 12, 3], None, r"uint8, \[2, H, W, 3\] or \[N, 2, H, W, 3\], of 2 cameras, got uint8 \[8, 12, 3\]"),
        (2, [3, 8, 12, 3], None, r"of 2 cameras, got uint8 \[3, 8, 12, 3\]"),
        (2, [4, 3, 8, 12, 3], None, r"of 2 cameras, got uint8 \[4, 3, 8, 12, 3\]"),
        (2, [2, 8, 12, 3], [8, 12, 3], r"the shape of `image`.*got \[8, 12, 3\] and \[2, 8, 12, 3\]"),
        (2, [1, 2, 8, 12, 3], [1, 2, 8, 12, 3], "must have the shape of `image`, "),
        (2, [8, 12, 3], [12, 3], r"`wrist_image` must be uint8, \[H, W, 3\] or \[N, H, W, 3\], got uint8 \[12, 3\]"),
        (2, [8, 12, 3], [17, 1, 3], "`wrist_image` must have at most 16 pixels a side"),
        (2, [5, 2, 8, 12, 3], None, "at most 4 observations, got 5"),
        (2, [5, 8, 12, 3], [5, 8, 12, 3], "at most 4 observations, got 5"),
        (3, [8, 12, 3], [8, 12, 3], "`wrist_image` must be left out.*3 cameras"),
        (None, [5, 2, 8, 12, 3], None, "at most 4 observations, got 5"),
        (None, [1, 9, 8, 12, 3], None, "of at most 8 cameras, got 9"),
        (None, [1, 1, 1, 1, 1, 3], None, r"\[N, H, W, 3\] or \[N, cameras, H, W, 3\], got uint8"),
        (None, [1, 1, 17, 1, 3], None, "at most 16 pixels a side"),
    ],
)
def test_pictures_that_the_policy_does_not_look_at_are_refused(cameras, image, wrist, error):
    given = {"image": np.zeros(image, np.uint8), "instruction": "stack"}
    if wrist is not None:
        given["wrist_image"] = np.zeros(wrist, np.uint8)
    with pytest.raises(ValueError, match=error):
        read_request(given, LIMITS, num_cameras=cameras)


def test_a_reset_alone_and_a_policy_without_state():
    assert read_request({"reset": True}, LIMITS, 3).obs is None
    assert read_request({"image": IMAGE, "instruction": "stack"}, LIMITS).obs.state is None


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ([], "a request must be a map, got list"),
        ({}, "`image` must be uint8.*got none"),
        (GOOD | {"imgae": IMAGE}, "must hold only image, .*got imgae"),
        (GOOD | {"image": IMAGE.astype(np.float32)}, r"got float32 \[8, 12, 3\]"),
        (GOOD | {"image": IMAGE[..., :2]}, r"got uint8 \[8, 12, 2\]"),
        (GOOD | {"image": IMAGE[0]}, r"got uint8 \[12, 3\]"),
        (GOOD | {"image": IMAGE[:0]}, r"got uint8 \[0, 12, 3\]"),
        (GOOD | {"image": "picture.png"}, "got str"),
        (GOOD | {"image": np.zeros((17, 1, 3), np.uint8)}, "at most 16 pixels a side"),
        (rows(5), "at most 4 observations, got 5"),
        (rows(0), r"got uint8 \[0, 8, 12, 3\]"),
        (GOOD | {"state": None}, r"`state` must be \[3\] or \[N, 3\], got none"),
        (GOOD | {"state": [0.0, 1.0, 2.0]}, r"shape \[3\], got list"),
        (GOOD | {"state": STATE[:2]}, r"shape \[3\], got \[2\]"),
        (GOOD | {"state": STATE[None]}, r"shape \[3\], got \[1, 3\]"),
        (rows(2) | {"state": np.zeros((3, 3))}, r"shape \[2, 3\], got \[3, 3\]"),
        (GOOD | {"state": np.array([0.0, np.nan, np.inf])}, "not finite"),
        (GOOD | {"state": np.array([0.0, 0.0, 1e300])}, "not finite in float32"),
        (GOOD | {"instruction": None}, "a string, or a list of 1, got 'None'"),
        (rows(2) | {"instruction": ["a"]}, "a string, or a list of 2"),
        (rows(2) | {"instruction": ["a", 1]}, "a string, or a list of 2"),
        (GOOD | {"instruction": "x" * 11}, "at most 10 characters, got 11"),
        (GOOD | {"temperature": -1}, "`temperature` must be a number, at least 0, got -1"),
        (GOOD | {"temperature": float("nan")}, "got nan"),
        (GOOD | {"temperature": True}, "got True"),
        (GOOD | {"reset": 1}, "`reset` must be true or false, got 1"),
        (GOOD | {"seed": 1}, "given with `reset`, got 1"),
        (GOOD | {"reset": True, "seed": -1}, "from 0 to .*got -1"),
    ],
)
def test_what_is_wrong_is_named(message, error):
    with pytest.raises(ValueError, match=error):
        read_request(message, LIMITS, 3)


def test_limits_are_positive():
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got 0"):
        Limits(max_rows=0)
