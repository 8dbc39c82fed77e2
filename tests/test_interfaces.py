"""Which step of a chunk a token belongs to, which scores, losses and masks all count by."""

import pytest

from trl_stare.interfaces import token_steps


@pytest.mark.parametrize(
    ("num_tokens", "chunk_size", "steps"), [(6, 3, [0, 0, 1, 1, 2, 2]), (4, 4, [0, 1, 2, 3]), (3, 1, [0, 0, 0])]
)
def test_every_step_has_as_many_tokens(num_tokens, chunk_size, steps):
    assert token_steps(num_tokens, chunk_size).tolist() == steps


def test_tokens_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="`num_tokens` must be a multiple of the 3 steps of a chunk, got 7"):
        token_steps(7, 3)
