"""A contact sheet of pictures, the neighbours that a CLIM run found, and mixed queries."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from clsa.learning.neighbours import Partners
from clsa.loading.crops import Cuts
from clsa.loading.loader import eval_crops, eval_images
from clsa.loading.order import Companions
from clsa.options.commands import PreviewOptions
from clsa.options.config import read_yaml
from clsa.options.run import RunOptions
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Source
from clsa.runs import checkpoint
from clsa.runs.folder import RunFolder
from clsa.system import files
from clsa.system.errors import ClsaError, Exit
from clsa.views import transform
from clsa.views.contact_sheet import contact_sheet
from clsa.views.mixing import draw, mix
from clsa.views.specs import ViewSpec, weak_specs

CPU = torch.device("cpu")
NUM_ROWS = 8


def preview(options: PreviewOptions) -> Path:
    """Draw the neighbours of some pictures of a run; return the path of the image.

    Raises:
        ClsaError: if the run has no neighbours, or the pictures are not those of the run.
    """
    folder = RunFolder(options.run)
    run = RunOptions.parse(read_yaml(folder.config), str(folder.config))
    if not options.neighbours:
        raise ClsaError("clsa preview", "nothing to show was chosen", "add --neighbours")
    if not run.clim:
        why = "its pictures have no neighbours: it runs without --clim"
        raise ClsaError(str(options.run), why, "give a run with --clim")
    saved = checkpoint.load_newest(folder.checkpoints)
    state = saved.state["method"] if saved else {}
    positives = next((state[name] for name in state if name.endswith("neighbours.positives")), None)
    found = next((state[name] for name in state if name.endswith("neighbours.found")), False)
    if saved is None or positives is None or not found:
        why = "its neighbours have not been found yet (mixture.start), or were not saved"
        raise ClsaError(str(options.run), why, "wait for a checkpoint after its first refresh")
    data = run.data if options.data is None else run.data.model_copy(update={"data": options.data})
    source = open_source(data.data, "train", data)
    if source.digest() != saved.state["data_digest"]:
        why = "these are not the pictures that the run learns from"
        raise ClsaError(data.data, why, "name the run's pictures by --data", Exit.NO_INPUT)
    epoch = saved.state["step"] // (len(source) // run.batch_size)
    out = options.out or folder.neighbours
    partners = Partners(positives.numpy(), run.batch_size)
    draw_neighbours(source, partners, run, epoch, out, options.count)
    return out


def draw_neighbours(
    source: Source,
    partners: Companions | None,
    options: RunOptions,
    epoch: int,
    path: Path,
    num_rows: int = NUM_ROWS,
) -> None:
    """Write a sheet: pictures, their positives, and a mixed query of each as in this epoch.

    Args:
        partners: of the epoch; nothing is written unless they are `Partners`.
        epoch: the epoch whose random draws are shown.
        num_rows: number of pictures, spread evenly over the set.
    """
    if not isinstance(partners, Partners):
        return
    count = min(num_rows, len(source))
    anchors = np.linspace(0, len(source) - 1, count).astype(np.int64)
    positives = partners.positives[anchors]
    shown = np.unique(np.concatenate([anchors, positives.ravel()]))
    size, pictures = options.views.size, {}
    for numbers, originals in eval_images(source, shown, size, 1.0, CPU):
        pictures |= dict(zip(numbers.tolist(), originals.round().byte(), strict=True))
    blank = torch.full((3, size, size), 255, dtype=torch.uint8)
    mixed = mixed_queries(source, partners, options, epoch, anchors)
    rows = []
    for anchor, others, query in zip(anchors.tolist(), positives.tolist(), mixed, strict=True):
        cells = [pictures.get(other, blank) if other != anchor else blank for other in others]
        rows.append([pictures.get(anchor, blank), *cells, blank if query is None else query])
    titles = ["picture", *(f"positive {i + 1}" for i in range(positives.shape[1])), "mixed query"]
    image = contact_sheet(rows, titles)
    files.write_atomic(path, lambda file: image.save(file, format="PNG"))


def mixed_queries(
    source: Source,
    partners: Partners,
    options: RunOptions,
    epoch: int,
    anchors: Int64[np.ndarray, " b"],
) -> list[Tensor | None]:
    """Each picture's first weak query, mixed with its partner; None if either is unreadable."""
    spec = weak_specs(options.views, keyed=True, least=2)[1]
    chosen = partners.chosen(options.seed, epoch, anchors)
    step = epoch * (len(source) // options.batch_size)
    index = torch.from_numpy(anchors)
    mixture = draw(options.mixture, options.views.size, options.seed, step, index)
    queries: list[Tensor | None] = []
    for row, (anchor, partner) in enumerate(zip(anchors, chosen, strict=True)):
        pair = (anchor, anchor), (partner, len(source) + anchor)
        found = (
            one_view(source, spec, options.seed, epoch, int(number), int(drawn))
            for number, drawn in pair
        )
        seen = [view for view in found if view is not None]
        if len(seen) < 2:
            queries.append(None)
        elif options.mixture.mixing == "none":
            queries.append(seen[0][0])
        else:
            queries.append(mix(seen[0], seen[1], mixture.part(row, row + 1))[0])
    return queries


def one_view(
    source: Source, spec: ViewSpec, seed: int, epoch: int, number: int, drawn: int
) -> Tensor | None:
    """A view of picture `number`, with the draws of number `drawn`; None if it is unreadable."""
    draws = np.array([drawn])

    def cut(_: object, heights: Int64[np.ndarray, "1"], widths: Int64[np.ndarray, "1"]) -> Cuts:
        return transform.crop_params(spec, seed, epoch, draws, heights, widths)

    for _, crops in eval_crops(source, np.array([number]), spec.size, cut, CPU):
        return transform.pixels(crops, transform.sample(spec, seed, epoch, draws), spec)
    return None
