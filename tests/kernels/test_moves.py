"""Block moves on a CPU: right blocks, neighbours merged, errors that name the argument."""

from __future__ import annotations

import pytest
import torch

from litecache.errors import KernelError
from litecache.kernels.moves import _runs, move_blocks


def test_blocks_land_where_they_were_sent_and_nowhere_else() -> None:
    source = torch.randint(0, 256, (8, 64), dtype=torch.uint8)
    target = torch.zeros(6, 64, dtype=torch.uint8)
    move_blocks(source, target, [2, 3, 7], [0, 1, 5])
    assert torch.equal(target[[0, 1, 5]], source[[2, 3, 7]])
    assert target[2:5].max() == 0


def test_neighbours_on_both_sides_make_one_copy() -> None:
    assert _runs([2, 3, 4, 9, 10], [5, 6, 7, 8, 1]) == [(0, 3), (3, 4), (4, 5)]
    assert _runs([1, 2, 3, 4], [0, 1, 2, 3]) == [(0, 4)]
    assert _runs([], []) == []


@pytest.mark.parametrize(
    ("src", "dst", "name"), [([0], [], "dst"), ([8], [0], "src"), ([0], [-1], "dst")]
)
def test_bad_blocks_are_named(src: list[int], dst: list[int], name: str) -> None:
    source, target = (torch.zeros(4, 64, dtype=torch.uint8) for _ in range(2))
    with pytest.raises(KernelError, match=name):
        move_blocks(source, target, src, dst)


def test_sides_of_other_block_sizes_are_refused() -> None:
    source, target = (torch.zeros(4, size, dtype=torch.uint8) for size in (64, 32))
    with pytest.raises(KernelError, match="target"):
        move_blocks(source, target, [0], [0])
