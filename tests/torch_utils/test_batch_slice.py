"""Random numbers of a part of a batch: those of the whole, and no more memory than the part needs."""

import pytest
import torch
import torch.nn.functional as F

from refine.torch_utils.batch_slice import RowsOfBatch

PRIOR = torch.tensor([1.0, 2.0, 3.0])
DRAWS = {
    "randn": lambda n: torch.randn(n, 4, 5),
    "rand": lambda n: torch.rand([n, 1], dtype=torch.float64),
    "randint": lambda n: torch.randint(1000, [n, 1]),
    "randint from": lambda n: torch.randint(5, 1000, (n,)),
    "multinomial": lambda n: torch.multinomial(PRIOR, n, replacement=True),
    "randn_like": lambda n: torch.randn_like(torch.zeros(n, 3, 4, 4).to(memory_format=torch.channels_last)),
    "dropout": lambda n: F.dropout(torch.ones(n, 3, 4, 4), 0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_rows_are_those_of_the_whole_batch(draw):
    torch.manual_seed(1)
    whole, after = draw(8), torch.rand(1)
    torch.manual_seed(1)
    with RowsOfBatch(2, 5, 8):
        part = draw(3)
    assert torch.equal(part, whole[2:5])
    assert torch.equal(torch.rand(1), after)  # and so are all that follow
    assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_what_is_no_batch_is_drawn_as_it_is():
    torch.manual_seed(1)
    expected = torch.randint(10, [4]), torch.randn(2, 3)
    torch.manual_seed(1)
    with RowsOfBatch(2, 5, 8):
        found = torch.randint(10, [4]), torch.randn(2, 3)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
