"""docs/own_vla.md does what it says: its policy passes its own test, and one step of imitation changes it."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from openvla_toy import make_obs

from trl_stare import TokenPolicy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_vla.md"
page = sys.modules.setdefault("own_vla_page", ModuleType("own_vla_page"))
for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
    exec(compile(block, PAGE, "exec"), vars(page))

TestMyPolicy = page.TestMyPolicy


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    processor = TokenPolicy.create_tiny(
        {"any": {"action": {"scale": [1.0] * 7}, "state": {"mean": [0.0], "std": [1.0]}}}
    ).processor
    return page.MyPolicy(page.MyModel(page.MyConfig(norm_stats=page.STATISTICS)), processor)


def test_it_learns_two_actions(policy):
    inputs = policy.prepare(make_obs("stack", "lift"))
    actions = torch.tensor([[[0.05] * 6 + [1.0]], [[-0.05] * 6 + [-1.0]]])
    trace = policy.encode(actions)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        policy.imitation_loss(inputs, trace, torch.ones_like(trace, dtype=torch.bool)).backward()
        optimizer.step()
    done = policy.act(inputs, temperature=0.0).actions
    torch.testing.assert_close(done, actions, atol=0.11, rtol=0)


def test_it_is_found_by_its_model_type(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    assert type(TokenPolicy.from_pretrained(tmp_path)) is page.MyPolicy


def test_recipes_keep_the_only_statistics_without_being_told_their_name(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    loaded = TokenPolicy.from_pretrained(tmp_path)
    loaded.keep_statistics()
    assert loaded.model.config.norm_stats == page.STATISTICS and loaded.unnorm_key == "my_robot"


def test_a_model_whose_module_was_not_imported_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nobodys_vla"}')
    with pytest.raises(
        ValueError, match="`model_type` is registered.*import its module first, in recipes by `--task_module`"
    ):
        TokenPolicy.from_pretrained(tmp_path)
