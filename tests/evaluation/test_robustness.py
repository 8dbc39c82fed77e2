"""What a variation costs: numbers against literal tables, old files, and refusal to mix."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trl_stare.evaluation import (
    PlayedEpisode,
    compare_varied,
    holm,
    measure_robustness,
    played_variations,
    plot_variations,
    read_played,
    robustness_table,
    write_played,
    write_robustness,
)
from trl_stare.evaluation.records import EpisodeResult

WHAT = {"camera/shift": "camera off", "light/dim": "half the light"}


def rows(solved: str, task: str = "PushCube-v1", variation: str = "nominal", void: str = "") -> list[PlayedEpisode]:
    """An episode per letter, seeds from 0 on: `1` is solved once, `e` also at the end, `0` not, `v` void."""
    return [
        PlayedEpisode(
            task,
            0,
            EpisodeResult(seed, letter in "1e", letter == "e", 9, False, True, ()),
            "x" if letter == "v" else "",
            variation=variation,
        )
        for seed, letter in enumerate(solved)
    ]


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2]) == [0.2] and holm([]) == []
    assert holm([0.5, 0.9, 0.001, 0.6]) == pytest.approx([1, 1, 0.004, 1])


def test_every_variation_is_paired_with_the_nominal_task():
    nominal = rows("1111100000")
    varied = {"camera/shift": rows("1000000001", variation="camera/shift"), "light/dim": rows("v111100000")}
    found = measure_robustness(nominal, varied, rule="success_once")
    assert list(found) == ["PushCube-v1"] and list(found["PushCube-v1"]) == list(varied)
    camera, light = found["PushCube-v1"].values()
    assert (camera.a.k, camera.b.k, camera.b.n) == (5, 2, 10) and camera.difference.value == pytest.approx(-0.3)
    assert (camera.test.a_only, camera.test.b_only) == (4, 1) and camera.test.p_value == pytest.approx(0.375)
    assert (light.a.k, light.b.k, light.b.n) == (4, 4, 9), "a void episode leaves the pair"
    table = robustness_table(found, rule="success_once", what=WHAT)
    assert "| nominal |  | 10 | 50.0 % [23.7, 76.3] |" in table
    assert "| camera/shift | camera off | 10 | 20.0 % [5.7, 51.0] | -30.0 points [" in table
    assert "] | 4 | 1 | 0.38 | 0.75 |" in table and "Success rule: success_once" in table


def test_tasks_by_themselves_and_together(tmp_path):
    nominal = rows("1e10") + rows("1111", task="PullCube-v1")
    varied = {"light/dim": rows("0010") + rows("e111", task="PullCube-v1")}
    found = measure_robustness(nominal, varied, rule="success_once")
    assert {task: (c["light/dim"].a.k, c["light/dim"].b.k) for task, c in found.items()} == {
        "all tasks": (7, 5),
        "PushCube-v1": (3, 1),
        "PullCube-v1": (4, 4),
    }
    at_end = measure_robustness(nominal, varied, rule="success_at_end")["all tasks"]["light/dim"]
    assert (at_end.a.k, at_end.b.k) == (1, 1)
    write_robustness(tmp_path, found, rule="success_once", what=WHAT)
    info = json.loads((tmp_path / "robustness.json").read_text())
    push = info["per_task"]["PushCube-v1"]["light/dim"]
    assert push["difference"] == -0.5 and push["only_nominal"] == 2 and push["what"] == "half the light"
    assert (
        push["nominal_ci95"] == pytest.approx([0.3006, 0.9544], abs=1e-4) and push["p_holm"] == push["p_value"] == 0.5
    )
    with pytest.raises(ValueError, match="at least one variation"):
        measure_robustness(nominal, {}, rule="success_once")


def test_two_policies_under_each_variation():
    a = {"nominal": rows("1111"), "camera/shift": rows("1000"), "light/dim": rows("v100")}
    b = {"nominal": rows("1111"), "camera/shift": rows("1110"), "light/dim": rows("1110")}
    found = {name: (c.a.k, c.b.k, c.a.n, c.test.b_only, c.test.a_only) for name, (c,) in compare_varied(a, b).items()}
    assert found == {"nominal": (4, 4, 4, 0, 0), "camera/shift": (1, 3, 4, 2, 0), "light/dim": (1, 2, 3, 1, 0)}
    (pooled,) = compare_varied(a, b, together=True)["all variations"]
    assert (pooled.a.k, pooled.b.k, pooled.a.n) == (2, 5, 7), "the nominal task is none of them"
    at_end = compare_varied(a, {name: rows("ee00") for name in a}, rules=("success_at_end", "success_at_end"))
    assert [(c.what, c.a.k, c.b.k) for (c,) in at_end.values()] == [
        ("success_at_end", 0, 2),
        ("success_at_end", 0, 2),
        ("success_at_end", 0, 1),
    ]
    with pytest.raises(ValueError, match=r"same variations, got \['camera/shift', .* and \['nominal'\]"):
        compare_varied(a, {"nominal": b["nominal"]})


def test_several_tasks_count_together_under_a_variation():
    a = {"light/dim": rows("10") + rows("00", task="PullCube-v1")}
    b = {"light/dim": rows("11") + rows("01", task="PullCube-v1")}
    found = compare_varied(a, b, together=True)
    assert list(found) == ["light/dim"], "one variation is all of them"
    assert [(c.a.k, c.b.k, c.a.n) for c in found["light/dim"]] == [(1, 3, 4)]


def test_a_folder_knows_its_variations(tmp_path):
    assert played_variations(tmp_path) == ()
    varied = {"light/dim": rows("10"), "camera/shift": rows("01")}
    write_robustness(
        tmp_path, measure_robustness(rows("11"), varied, rule="success_once"), rule="success_once", what=WHAT
    )
    assert played_variations(tmp_path) == ("nominal", "light/dim", "camera/shift")


def test_rows_say_what_was_varied_and_old_ones_were_nominal(tmp_path):
    file = tmp_path / "rows.parquet"
    write_played(file, rows("10", variation="camera/shift"))
    assert {row.variation for row in read_played(file)} == {"camera/shift"}
    pq.write_table(pq.read_table(file).drop_columns(["variation"]), file, write_page_checksum=True)
    assert {row.variation for row in read_played(file)} == {"nominal"}


def test_the_picture_shows_every_variation(tmp_path):
    colours = {name: np.full((8, 8, 3), value, np.uint8) for name, value in (("a", 0), ("b", 90), ("c", 200))}
    plot_variations(colours, tmp_path / "grid.png", columns=2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    shares = [(np.abs(pixels.astype(int) - value) < 2).mean() for value in (90, 200)]
    assert min(shares) > 0.1 and pixels.shape[0] > 200
