"""ManiSkill's messages: each is there, and each once."""

import logging
from contextlib import closing

import pytest
import torch

from trl_stare.envs.maniskill import Simulator
from trl_stare.envs.messages import Once, tell_once
from trl_stare.envs.registry import get_simulated_task

WARNING, ERROR = logging.WARNING, logging.ERROR


class Messages(logging.Handler):
    """Keeps what reaches it."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def heard(monkeypatch) -> Messages:
    """What ManiSkill's logger lets pass, as if nothing had been said before."""
    from mani_skill import logger

    handler = Messages()
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "filters", [])
    return handler


def test_a_message_passes_once_of_each_level():
    once = Once()
    said = [("a %d", 1, WARNING), ("b", None, WARNING), ("a %d", 1, WARNING), ("a %d", 2, WARNING), ("b", None, ERROR)]
    records = [logging.LogRecord("x", level, "", 0, text, value and (value,), None) for text, value, level in said]
    assert [once.filter(record) for record in records] == [True, True, False, True, True]


def test_a_second_simulator_adds_no_second_filter(heard):
    from mani_skill import logger

    tell_once()
    tell_once()
    assert len(logger.filters) == 1


@pytest.mark.bridge_assets
def test_episodes_do_not_repeat_what_maniskill_says_of_a_scene(heard):
    task = get_simulated_task("PutCarrotOnPlateInScene-v1")
    with closing(Simulator(task, num_envs=1, image_size=16, visuals="stock", device="cpu")) as simulator:
        simulator.reset([0], torch.tensor([0]))
        simulator.reset([1], torch.tensor([0]))
    assert any("Mimic targets dictionary is missing" in text for text in heard.texts)
    assert len(heard.texts) == len(set(heard.texts))
