import numpy as np
import pytest
import torch
from torch import Tensor

from clsa.views import geometry, rng
from tests.support import reference_memory


def uniforms(count: int, grid: int, epoch: int = 0) -> Tensor:
    slots = torch.arange(3 * grid**2)
    u = rng.uniforms(0, epoch, torch.arange(count), rng.JIGSAW, slots)
    return u.unflatten(1, (grid**2, 3))


def numbered(count: int, size: int) -> Tensor:
    """Pixels whose values encode their picture, row and column."""
    pixels = torch.arange(size * size, dtype=torch.float64).view(size, size)
    pictures = torch.arange(count, dtype=torch.float64)[:, None, None, None]
    return (pixels + pictures * 1e6).expand(count, 3, size, size) + torch.arange(3)[:, None, None]


@pytest.mark.parametrize(
    ("size", "grid", "side"), [(255, 3, 64), (40, 2, 16), (24, 2, 12), (23, 5, 3), (16, 1, 16)]
)
def test_patches_equal_a_slow_loop(size: int, grid: int, side: int) -> None:
    images, u = numbered(3, size), uniforms(3, grid)
    patches = geometry.jigsaw(images, u, grid, side)
    assert patches.shape == (3 * grid**2, 3, side, side)
    assert patches.is_contiguous(memory_format=torch.channels_last)
    wanted = reference_memory.jigsaw(images.numpy(), u.numpy(), grid, side)
    assert np.array_equal(patches.numpy(), wanted)


def test_known_draws_give_the_cells_in_order_at_known_places() -> None:
    """A picture of 8 pixels in 2 x 2 cells of 4, patches of 2: the corner is 0, 1 or 2."""
    images = numbered(1, 8)
    u = torch.zeros(1, 4, 3, dtype=torch.float64)
    u[0, :, 2] = torch.arange(4) / 4
    patches = geometry.jigsaw(images, u, 2, 2)[:, 0]
    assert [int(patch[0, 0]) for patch in patches] == [0, 4, 32, 36]
    u[0, 0, :2] = 1 - 2**-24  # the last place of the cell
    u[0, 1, :2] = torch.tensor([0.0, 0.34])
    u[0, :, 2] = torch.tensor([0.9, 0.2, 0.5, 0.1])  # cells 3, 1, 2, 0
    patches = geometry.jigsaw(images, u, 2, 2)[:, 0]
    assert [int(patch[0, 0]) for patch in patches] == [36 + 18, 4 + 1, 32, 0]
    assert torch.equal(patches[0], images[0, 0, 6:, 6:])


def test_every_cell_is_shown_once_by_a_patch_of_its_own_pixels() -> None:
    size, grid, side, count = 30, 3, 7, 50
    patches = geometry.jigsaw(numbered(count, size), uniforms(count, grid), grid, side)
    number = patches[:, 0].long()
    picture, pixel = number // 1_000_000, number % 1_000_000
    row, column = pixel // size, pixel % size
    assert torch.equal(picture[:, 0, 0], torch.arange(count).repeat_interleave(grid**2))
    cells = row // 10 * grid + column // 10
    assert (cells == cells[:, :1, :1]).all(), "a patch stays in one cell"
    shown = cells[:, 0, 0].view(count, -1)
    assert torch.equal(shown.sort(1).values, torch.arange(grid**2).expand(count, -1))
    assert len(shown.unique(dim=0)) > 45, "orders differ between pictures"
    corners = (row[:, 0, 0] % 10).bincount()
    assert len(corners) == 4 and (corners > 60).all(), "rows 0..3 of a cell are equally likely"


def test_replays_are_equal_and_steps_differ() -> None:
    images = numbered(4, 24)
    first, again = (geometry.jigsaw(images, uniforms(4, 2), 2, 8) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, geometry.jigsaw(images, uniforms(4, 2, epoch=1), 2, 8))
    half = geometry.jigsaw(images[2:], uniforms(4, 2)[2:], 2, 8)
    assert torch.equal(half, first[8:]), "a picture's patches do not depend on its batch"


@pytest.mark.parametrize(("grid", "side"), [(2, 13), (3, 8), (2, 0)])
def test_patches_larger_than_their_cell_and_missing_draws_are_refused(grid: int, side: int) -> None:
    with pytest.raises(ValueError, match="places and patches"):
        geometry.jigsaw(numbered(2, 24), uniforms(2, 2), grid, side)
