"""One forward of the wrapper per loss, on a real DDP wrapper of one process; `forward` survives what a block does."""

import copy

import pytest
import torch
from torch import nn

from trl_stare.trainers._compat import forward_once, keep_forward


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("patched", [False, True])
def test_two_forwards_are_one_of_the_wrapper(process_group, patched):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    if patched:  # as accelerate does for mixed precision
        model.forward = model.forward
    before = dict(model.__dict__)
    wrapped, calls = nn.parallel.DistributedDataParallel(model), []
    wrapped.register_forward_pre_hook(lambda *_: calls.append("wrapper"))
    model.register_forward_hook(lambda _, args, output: calls.append(tuple(output.shape)))

    scores = forward_once(wrapped, model, lambda rows: torch.cat([model(rows[:1]), model(rows[1:])]), x)
    # the last one is the wrapper's own call of the model, which ran both
    assert calls == ["wrapper", (1, 1), (3, 1), (4, 1)]
    assert model.__dict__.get("forward") == before.get("forward")
    scores.sum().backward()
    torch.testing.assert_close(model.weight.grad, x.sum(dim=0, keepdim=True))


def test_without_a_wrapper_the_method_is_called():
    model = nn.Linear(3, 1)
    assert forward_once(model, model, lambda a, b: a + b, 1, 2) == 3


def test_a_failing_method_leaves_the_model_as_it_was(process_group):
    model = nn.Linear(3, 1)
    wrapped = nn.parallel.DistributedDataParallel(model)

    def fail(rows):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        forward_once(wrapped, model, fail, torch.zeros(1, 3))
    assert "forward" not in model.__dict__


def test_keep_forward_undoes_a_patch_that_closes_over_the_original():
    model = nn.Linear(1, 1)
    with keep_forward(model):
        original = model.forward
        model.forward = lambda rows: original(rows)
    copied = copy.deepcopy(model)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert copied(torch.ones(1, 1)).item() != 0.0
