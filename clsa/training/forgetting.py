"""What a staged run still knows: accuracy on every stage so far, as numbers, table and picture."""

import io
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor, nn

from clsa.evaluate.classify.knn import knn_predict
from clsa.evaluate.features.extract import extract, frozen
from clsa.evaluate.features.split import Split
from clsa.evaluate.results.records import accuracies
from clsa.options.run import ViewOptions
from clsa.pictures.sources import Source
from clsa.system import files

NEIGHBOURS = 20
CELL, LEFT, TOP = 64, 150, 70


class Forgetting(NamedTuple):
    """Top-1 of weighted 20-NN in percent, after each stage, on the pictures of each stage so far.

    The bank holds the labelled training pictures of all stages so far. After a later stage there
    are more classes to distinguish, so accuracies fall for that reason too, also of a baseline.
    """

    stages: list[str]
    accuracy: list[list[float]]
    """accuracy[t][s]: encoder after stage t, on the queries of stage s <= t."""
    random: list[float]
    """Accuracy of the random encoder on the queries of each stage, all stages in the bank."""
    everything: list[float]
    """Accuracy after each stage, on the queries of all stages so far together."""

    def average(self, stage: int) -> float:
        """Mean accuracy over the stages so far."""
        return statistics.fmean(self.accuracy[stage])

    def forgotten(self) -> float | None:
        """Mean over the earlier stages of: best accuracy before the last stage minus the last one.

        In percentage points; None with fewer than two stages (Chaudhry et al. 2018).
        """
        *before, last = self.accuracy
        if not before:
            return None
        return statistics.fmean(
            max(row[s] for row in before[s:]) - last[s] for s in range(len(before))
        )


def judge(
    encoder: nn.Module, parts: list[Split], views: ViewOptions, device: torch.device
) -> tuple[list[float], float]:
    """Accuracy in percent on the queries of each part, and of all parts; all banks are joined."""
    num_classes = len(parts[0].bank.classes)

    def of(sources: Iterable[Source]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for source in sources:
            rows, features = extract(encoder, source, np.arange(len(source)), views, device)
            found.append((features.cpu(), torch.from_numpy(source.labels[rows])))
        return found

    with frozen(encoder):
        banks, queries = of(part.bank for part in parts), of(part.queries for part in parts)
    bank, known = (torch.cat(each) for each in zip(*banks, strict=True))
    predicted = [
        knn_predict(rows, bank, known, num_classes, NEIGHBOURS).argmax(1) for rows, _ in queries
    ]
    single = [
        accuracies(found, labels)["top1"]
        for found, (_, labels) in zip(predicted, queries, strict=True)
    ]
    labels = torch.cat([labels for _, labels in queries])
    return single, accuracies(torch.cat(predicted), labels)["top1"]


def write(folder: Path, found: Forgetting) -> None:
    """Write `forgetting.json`, `forgetting.md` and `forgetting.png`."""
    facts = {
        **found._asdict(),
        "average": [found.average(t) for t in range(len(found.accuracy))],
        "forgetting": found.forgotten(),
    }
    files.write_text(folder / "forgetting.json", json.dumps(facts, indent=1) + "\n")
    files.write_text(folder / "forgetting.md", markdown(found))
    data = io.BytesIO()
    picture(found).save(data, "PNG")
    files.write_atomic(folder / "forgetting.png", lambda file: file.write(data.getvalue()))


def lines_of(found: Forgetting) -> list[list[str]]:
    """Rows of the table: name of the stage, accuracy on each stage, their mean, all together."""
    count = len(found.stages)
    lines = []
    for t, row in enumerate(found.accuracy):
        cells = [f"{value:.1f}" for value in row] + [""] * (count - len(row))
        whole = [f"{found.average(t):.1f}", f"{found.everything[t]:.1f}"]
        lines.append([f"after {found.stages[t]}", *cells, *whole])
    random = [f"{value:.1f}" for value in found.random]
    mean = f"{statistics.fmean(found.random):.1f}" if found.random else ""
    lines.append(["random", *random, *[""] * (count - len(random)), mean, ""])
    return lines


def describe(found: Forgetting) -> str:
    """Average accuracy and forgetting after the last stage."""
    last = len(found.accuracy) - 1
    average = f"average accuracy {found.average(last):.1f} %"
    lost = found.forgotten()
    return average if lost is None else f"{average}, forgetting {lost:+.1f} points"


def markdown(found: Forgetting) -> str:
    """The text of forgetting.md."""
    titles = ["", *found.stages, "mean", "all"]
    rows = [titles, ["---"] * len(titles), *lines_of(found)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    note = (
        "Top-1 of weighted 20-NN in percent among the classes of all stages so far. `all`: on the "
        "pictures of these stages together. Forgetting: for each earlier stage, the best accuracy "
        "before the last stage minus that after it; the mean of these. random: the encoder before "
        "the first stage, with all stages in the bank."
    )
    return f"# Forgetting\n\n{describe(found)}\n\n{table}\n\n{note}\n"


def printed(found: Forgetting) -> Table:
    """The table for a terminal."""
    table = Table("", *found.stages, "mean", "all", title=describe(found), title_justify="left")
    for line in lines_of(found):
        table.add_row(*line)
    return table


def picture(found: Forgetting) -> Image.Image:
    """A heat map: one row after each stage, one column per stage; dark means accurate."""
    count, text = len(found.stages), ImageFont.load_default(14)
    height = TOP + (len(found.accuracy) + 1) * CELL + 50
    sheet = Image.new("RGB", (max(LEFT + count * CELL, 340) + 20, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), "20-NN accuracy in percent", "black", ImageFont.load_default(16))
    draw.text((10, 30), describe(found), "black", text)
    highest = max(max(row) for row in [*found.accuracy, found.random or [0.0]]) or 1.0
    names = [f"after {name}" for name in found.stages[: len(found.accuracy)]]
    rows = [*zip(names, found.accuracy, strict=True), ("random", found.random)]
    for i, (name, row) in enumerate(rows):
        top = TOP + i * CELL + (10 if name == "random" else 0)
        draw.text((10, top + CELL / 2), name, "black", text, anchor="lm")
        for j, value in enumerate(row):
            left, share = LEFT + j * CELL, value / highest
            fill = tuple(round(255 - share * (255 - dark)) for dark in (8, 48, 107))
            draw.rectangle((left, top, left + CELL - 3, top + CELL - 3), fill=fill)
            ink = "white" if share > 0.55 else "black"
            middle = (left + CELL / 2 - 1, top + CELL / 2 - 1)
            draw.text(middle, f"{value:.1f}", ink, text, anchor="mm")
    bottom = TOP + (len(rows)) * CELL + 12
    for j, name in enumerate(found.stages):
        draw.text((LEFT + j * CELL + CELL / 2, bottom), name, "black", text, anchor="mt")
    draw.text((10, bottom), "on pictures of", "black", text)
    return sheet
