"""`benchmarks/openvla.py` at a small size on the CPU: every figure is there, and its FLOPs are those of the sizes."""

import json

import pytest

from benchmarks.openvla import PROMPT_TOKENS, main, parse


def test_every_figure_is_measured(tmp_path):
    flags = ["--size", "tiny", "--device", "cpu", "--batches", "1,2", "--largest_update", "4", "--repeats", "1"]
    found = main(parse([*flags, "--json", str(tmp_path / "figures.json")]))
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    rows = found["figures"]
    assert set(rows) == {
        "openvla/act/1", "openvla/prefill/1", "openvla/act/2", "openvla/prefill/2", "oft/act/1", "oft/act/2",
        "lora/ppo/1", "lora/ppo/2", "lora/ppo/4", "lora/sta-tpo/2", "lora/sta-tpo/4",
    }  # fmt: skip
    for row in rows.values():
        speed = next(value for name, value in row.items() if name.endswith("_per_s"))
        assert speed * row["seconds"] > 0 and row["share_of_peak"] == pytest.approx(
            row["tflop"] / row["seconds"] / 989
        )
    # twice the batch, twice the work; an update also goes backward
    read, decided = rows["openvla/prefill/1"]["tflop"], rows["openvla/act/1"]["tflop"]
    assert rows["openvla/prefill/2"]["tflop"] == pytest.approx(2 * read) and rows["lora/ppo/1"]["tflop"] > 1.8 * read
    # two operations a weight: two Llama layers of four 64 x 64 and three 64 x 128, and the head of 64 x 32,064
    layers = 2 * 2 * (4 * 64**2 + 3 * 64 * 128)
    assert read * 1e12 > layers * (1 + 16 + PROMPT_TOKENS)
    # six more tokens read, behind the first that is written
    assert (decided - read) * 1e12 == pytest.approx(6 * (layers + 2 * 64 * 32064), rel=0.01)
