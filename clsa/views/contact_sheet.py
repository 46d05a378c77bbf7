"""Draws pictures in a grid with titles, for people to look at."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from clsa.views.transform import MEAN, STD


def contact_sheet(rows: list[list[Tensor]], titles: list[str], side: int = 96) -> Image.Image:
    """Draw a grid with one row per picture, one column per view, and a title above each column.

    Args:
        rows: (3, h, w) images: uint8 pixels, or floats normalised by `MEAN` and `STD`.
        titles: one per column.
        side: side of a cell in pixels.
    """
    gap, heading = 4, 16
    width, height = len(titles) * (side + gap) + gap, len(rows) * (side + gap) + heading
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (side + gap), 2), title, fill="black")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image.is_floating_point():
                scale, shift = (torch.tensor(numbers)[:, None, None] for numbers in (STD, MEAN))
                image = (image.cpu() * scale + shift).clamp(0, 1).mul(255).round().to(torch.uint8)
            cell = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            cell = cell.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(cell, (gap + j * (side + gap), heading + i * (side + gap)))
    return sheet
