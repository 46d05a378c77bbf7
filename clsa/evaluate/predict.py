"""Predict labels of pictures with a classifier that evaluation learned and saved."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from clsa.evaluate.features.extract import centre_views, encode, frozen
from clsa.evaluate.progress import watched
from clsa.evaluate.results.heads import load_head
from clsa.loading.loader import EVAL_CHUNK
from clsa.options.commands import PredictOptions
from clsa.options.run import DataOptions
from clsa.pictures import opening
from clsa.pictures.arrays import ARRAYS
from clsa.pictures.listing import SUFFIXES
from clsa.pictures.lists import LISTS
from clsa.pictures.names import as_text
from clsa.pictures.sources import Folder, Source
from clsa.runs import saved_encoder
from clsa.system import dist, files
from clsa.system.errors import ClsaError, Exit

PROBABILITY_DIGITS = 6


def predict(options: PredictOptions) -> str:
    """Write the likeliest labels of every picture to `options.out`; return a line for the user.

    CSV has the columns path, label_1, probability_1, label_2, ...; JSON is a list of objects with
    path, labels and probabilities. A picture that cannot be read gets no label. The encoder sees
    the centre crop of each picture, as in evaluation.

    Raises:
        ClsaError: if there is no head (`clsa evaluate` learns them) or no picture, or if the head
            belongs to another encoder.
    """
    encoder, made = saved_encoder.load_encoder_facts(options.run)
    head, facts = load_head(options.run, options.head, encoder)
    source = pictures(options.images).scale_from(made.data.value_range)
    device = dist.pick_device(options.device)
    encoder, layer = (head.encoder or encoder).to(device), head.layer.to(device)
    top = min(options.top, len(facts.classes))
    rows: list[dict[str, Any]] = [
        {"path": as_text(name), "labels": [], "probabilities": []} for name in source.ids
    ]
    views = centre_views(source, np.arange(len(source)), facts.views, device)
    with frozen(encoder):
        chunks = -(-len(source) // EVAL_CHUNK)
        for numbers, images in watched(views, chunks, "pictures"):
            logits = layer(encode(encoder, images, options.batch_size))
            best = facts.probabilities(logits.double()).topk(top, dim=1)
            for number, places, values in zip(
                numbers.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
            ):
                rows[number]["labels"] = [facts.classes[place] for place in places]
                rows[number]["probabilities"] = [round(v, PROBABILITY_DIGITS) for v in values]
    unreadable = sum(not row["labels"] for row in rows)
    if unreadable == len(rows):
        why = f"none of the {len(rows)} pictures can be read"
        raise ClsaError("nothing to label", why, "check them", Exit.BAD_DATA)
    _write(options.out, rows, top)
    summary = f"{options.out}: {len(rows):,} pictures labelled by {facts.told}"
    return summary + (f", {unreadable} of them unreadable, without a label" if unreadable else "")


def pictures(images: tuple[str, ...]) -> Source:
    """The pictures to label: image files named one by one, or one set."""
    if not images:
        raise ClsaError("no pictures", "none were named", "give files or a folder", Exit.NO_INPUT)
    alone = Path(images[0])
    listed = alone.suffix.lower() in (*LISTS, *ARRAYS)
    if len(images) == 1 and (listed or not alone.is_file()):
        if alone.suffix.lower() in SUFFIXES:
            raise ClsaError(images[0], "no such file", "check the path", Exit.NO_INPUT)
        return opening.open_source(images[0], "val", DataOptions())
    for name in images:
        if not os.path.isfile(name):
            why = "a folder among files" if os.path.isdir(name) else "no such file"
            raise ClsaError(name, why, "give image files, or one folder", Exit.NO_INPUT)
    return Folder("", images, np.full(len(images), -1, np.int64), [])


def _write(path: Path, rows: list[dict[str, Any]], top: int) -> None:
    with files.output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".json":
        files.write_text(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = [f"{word}_{k}" for k in range(1, top + 1) for word in ("label", "probability")]
    writer.writerow(["path", *titles])
    for row in rows:
        pairs = zip(row["labels"], row["probabilities"], strict=True)
        cells = [cell for pair in pairs for cell in pair]
        writer.writerow([row["path"], *cells, *[""] * (2 * top - len(cells))])
    files.write_text(path, text.getvalue())
