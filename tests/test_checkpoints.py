"""A path that is wrong is answered by its name, and by what was most likely meant."""

import pytest

from trl_stare.checkpoints import checkpoint_folder
from trl_stare.evaluation import resolve_policy
from trl_stare.policies import TokenPolicy
from trl_stare.policies.adapters import whole_checkpoint


def test_a_folder_of_checkpoints_tells_which_there_are(tmp_path):
    for name in ("policy", "initial", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "initial" / "config.json").write_text("{}")
    (tmp_path / "policy" / "adapter_config.json").write_text("{}")
    meant = f"got {tmp_path} without one. Did you mean {tmp_path}/initial or {tmp_path}/policy\\?"
    for find in (checkpoint_folder, TokenPolicy.from_pretrained):
        with pytest.raises(ValueError, match=meant):
            find(tmp_path)
    assert checkpoint_folder(tmp_path / "policy") == tmp_path / "policy"


@pytest.mark.parametrize("name", ["outputs/nothing", "outputs/nothing/at_all"])
def test_a_path_that_is_not_there_is_named(tmp_path, name):
    for find in (checkpoint_folder, lambda name: whole_checkpoint(name, tmp_path / "base"), resolve_policy):
        with pytest.raises(FileNotFoundError, match=f"got '{name}': there is no such folder, and the Hub says"):
            find(name)
