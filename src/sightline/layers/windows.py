"""Attention within windows: how a grid is cut into them, and what each may see (arXiv 2103.14030, section 3.2)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

Grid = tuple[int, int]
Padding = Literal["hidden", "seen", "seen_after_shift"]

APART = -100.0
"""What the published networks add to the logits between cells that a shift has brought together from afar."""


@dataclass(frozen=True)
class Windows:
    """A grid of (rows, columns), shifted up and left by `shift` cells in a circle and cut into windows.

    Where `window` does not divide the grid, zeros are put below and to the right. With `padding="hidden"` nothing
    attends to them; with "seen" they are keys like others (torchvision, transformers), and with "seen_after_shift" they
    are put there when the cells have been shifted, behind those that came round (timm).
    """

    grid: Grid
    window: Grid
    shift: Grid = (0, 0)
    padding: Padding = "hidden"

    @property
    def padded(self) -> Grid:
        """Rows and columns that whole windows cover."""
        rows, columns = (-(-cells // side) * side for cells, side in zip(self.grid, self.window, strict=True))
        return rows, columns

    @property
    def count(self) -> int:
        """The number of windows."""
        return self.padded[0] // self.window[0] * (self.padded[1] // self.window[1])

    def cut(self, x: Shaped[Tensor, "b r c d"]) -> Shaped[Tensor, "bw m d"]:
        """The cells of each window row by row; windows follow one another row by row, image after image."""
        below, right = (whole - cells for whole, cells in zip(self.padded, self.grid, strict=True))
        late = self.padding == "seen_after_shift"
        if late:
            x = self._rolled(x, -1)
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        if not late:
            x = self._rolled(x, -1)
        rows, columns = self.window
        return rearrange(x, "b (r h) (c w) d -> (b r c) (h w) d", h=rows, w=columns)

    def join(self, x: Shaped[Tensor, "bw m d"]) -> Shaped[Tensor, "b r c d"]:
        """What `cut` took apart, each cell in its place and padding left out."""
        across = (self.padded[0] // self.window[0], self.padded[1] // self.window[1])
        x = rearrange(
            x, "(b r c) (h w) d -> b (r h) (c w) d", r=across[0], c=across[1], h=self.window[0], w=self.window[1]
        )
        rows, columns = self.grid
        if self.padding == "seen_after_shift":
            return self._rolled(x[:, :rows, :columns], 1)
        return self._rolled(x, 1)[:, :rows, :columns]

    def _rolled(self, x: Shaped[Tensor, "b r c d"], way: int) -> Shaped[Tensor, "b r c d"]:
        return torch.roll(x, (way * self.shift[0], way * self.shift[1]), dims=(1, 2)) if any(self.shift) else x

    def mask(self, device: torch.device) -> Float[Tensor, "w 1 m m"] | None:
        """What each window adds to the logits of its (query, key) pairs; None where every pair may meet.

        A shift makes neighbours of cells from opposite edges. By the border of the last windows and the one where the
        cells that came round begin, either axis has three regions: cells of unlike regions are kept apart.
        """
        padded = self.padding == "hidden" and self.padded != self.grid
        if not any(self.shift) and not padded:
            return None
        regions = []
        for cells, side, step in zip(self.padded, self.window, self.shift, strict=True):
            at = torch.arange(cells, device=device)
            regions.append((at >= cells - side).long() + (at >= cells - step).long())
        region = 3 * regions[0][:, None] + regions[1]
        region = rearrange(region, "(r h) (c w) -> (r c) 1 (h w)", h=self.window[0], w=self.window[1])
        apart = rearrange(region, "w 1 m -> w 1 m 1") != rearrange(region, "w 1 m -> w 1 1 m")
        mask = torch.zeros(apart.shape, device=device).masked_fill(apart, APART)
        if padded:
            real = self.cut(torch.ones(1, *self.grid, 1, dtype=torch.bool, device=device))
            mask = mask.masked_fill(~rearrange(real, "w m 1 -> w 1 1 m"), -torch.inf)
        return mask

    def whole(self, weights: Float[Tensor, "bw h m m"], *, shares: bool = True) -> Float[Tensor, "b h n n"]:
        """The attention maps of the windows as one map over all cells of the grid.

        Pairs that share no window have weight 0. Padding is left out, and what its keys got goes to the others in
        proportion: every row sums to 1. With `shares=False` the numbers stay as they are.
        """
        rows, columns = self.grid
        size = 1 + rows * columns  # one more than cells: where padding is put
        cells = torch.arange(1, size, device=weights.device).reshape(1, rows, columns, 1)
        cell = self.cut(cells)[..., 0]
        place = (size * cell[:, :, None] + cell[:, None, :]).flatten()
        weights = rearrange(weights, "(b w) h q k -> b h (w q k)", w=self.count)
        plane = weights.new_zeros(*weights.shape[:2], size * size)
        plane[..., place] = weights
        plane = rearrange(plane, "b h (q k) -> b h q k", q=size)[..., 1:, 1:]
        return plane / plane.sum(dim=-1, keepdim=True) if shares else plane
