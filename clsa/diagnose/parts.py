"""The parts of `clsa diagnose`: each takes the `Inputs` and returns findings and figures."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.diagnose import figures, measures, operations
from clsa.diagnose.inputs import LEAST, Inputs, Part, spread_over
from clsa.evaluate.classify.knn import knn_predict
from clsa.evaluate.features.extract import centre_views, extract, frozen
from clsa.evaluate.results.records import accuracies
from clsa.learning.models import Network
from clsa.runs.snapshots import Snapshot, kept_encoders, snapshot_of
from clsa.system.errors import ClsaError, Exit

NEIGHBOURS, VOTE_TEMPERATURE, MAX_KNN_BANK = 20, 0.07, 10_000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def _pairs(inputs: Inputs) -> list[tuple[Network, Network]]:
    """Query and key network of each snapshot.

    Raises:
        ClsaError: if there are only encoders, without projector and key network.
    """
    pairs = [(each.query, each.key) for each in inputs.snapshots]
    found = [(query, key) for query, key in pairs if query is not None and key is not None]
    if len(found) < len(pairs):
        why = "this encoder has no projector and key network (not a checkpoint of a single run)"
        hint = "give the run folder; for a run in stages, give one of its stage-N folders"
        raise ClsaError(str(inputs.options.run), why, hint, Exit.NO_INPUT)
    return found


def similarity(inputs: Inputs) -> Part:
    """P+, Var-, entropy, KL and retrieval of weak and strong queries (CLSA Fig. 3 and 6)."""
    queries, keys = zip(*_pairs(inputs), strict=True)
    specs, options, temperature = inputs.specs(), inputs.options, inputs.opened.temperature
    bank_rows = spread_over(len(inputs.source), options.bank + 1)
    kept, banks = inputs.encoded(specs["key"], bank_rows, keys)
    positive = spread_over(len(kept), options.queries)
    asked = {
        kind: inputs.encoded(specs[kind], kept[positive], queries)[1] for kind in ("weak", "strong")
    }
    own, n, negatives = torch.from_numpy(positive).to(inputs.device), len(positive), len(kept) - 1
    settings = f"temperature={temperature} negatives={negatives}"
    findings, positives, variances = [], [], []
    for k, snapshot in enumerate(inputs.snapshots):
        bank, weak, strong = banks[k], asked["weak"][k], asked["strong"][k]
        stands = {
            kind: measures.positive_statistics(rows, bank, own, temperature)
            for kind, rows in (("weak", weak), ("strong", strong))
        }

        def add(name: str, value: float, unit: str, of: Snapshot = snapshot) -> None:
            findings.append(inputs.finding("similarity", name, value, unit, of, n, settings))

        for kind, stand in stands.items():
            for name, values in (("P+", stand.positive), ("Var-", stand.variance)):
                for share, at in zip(QUANTILES, _quantiles(values), strict=True):
                    add(f"{name} {kind} quantile {share}", at, "")
                add(f"{name} {kind} mean", values.mean().item(), "")
            add(f"entropy {kind}", stand.entropy.mean().item(), "nats")
            add(f"exp entropy {kind}", stand.entropy.exp().mean().item(), "rows")
            add(f"retrieval {kind}", 100 * stand.retrieved.double().mean().item(), "%")
        for name, field in (("P+", "positive"), ("Var-", "variance")):
            apart = measures.curve_distance(*(getattr(each, field) for each in stands.values()))
            add(f"{name} distance", apart, "")
        add(
            "KL weak strong",
            measures.divergence(weak, strong, bank, temperature).mean().item(),
            "nats",
        )
        curves = [[_array(getattr(stand, field)) for stand in stands.values()]
                  for field in ("positive", "variance")]  # fmt: skip
        positives.append(figures.Curve(snapshot.name, *curves[0]))
        variances.append(figures.Curve(snapshot.name, *curves[1]))
    note = inputs.note(n, f" · K = {negatives:,} negatives · T = {temperature}")
    draw = {"similarity": lambda: figures.similarity(positives, variances, negatives, note)}
    return Part(findings, draw)


def neighbours(inputs: Inputs) -> Part:
    """20-NN accuracy of centre crops and strong queries, with kept checkpoints (CLSA Fig. 5)."""
    bank, asked, name = inputs.parts
    settings = f"neighbours={NEIGHBOURS} knn_temperature={VOTE_TEMPERATURE} split={name}"
    rows = spread_over(len(bank), MAX_KNN_BANK)
    queries = spread_over(len(asked), inputs.options.num_pictures)
    digest, findings, n = inputs.parts.digest(), [], 0
    found: dict[str, tuple[float, float]] = {}
    run = inputs.opened.options
    kept = iter(()) if run is None else kept_encoders(inputs.options.run, run)
    random, trained = inputs.snapshots
    last = f"step {inputs.opened.facts.step}"
    steps = (snapshot_of(step, each) for step, each in kept if step != last)
    for snapshot in _in_turn(random, steps, trained):
        encoder = snapshot.encoder.to(inputs.device)
        with frozen(encoder):
            known, features = extract(encoder, bank, rows, inputs.views, inputs.device)
            values = []
            for kind, seed in (("clean", None), ("strong", inputs.options.seed)):
                seen, of = extract(
                    encoder, asked, queries, inputs.views, inputs.device, strong_seed=seed
                )
                labels = [torch.from_numpy(source.labels[numbers]).to(inputs.device)
                          for source, numbers in ((bank, known), (asked, seen))]  # fmt: skip
                scores = knn_predict(
                    of, features, labels[0], len(bank.classes), NEIGHBOURS, VOTE_TEMPERATURE
                )
                values.append(accuracies(scores.argmax(1), labels[1])["top1"])
                n = len(seen)
                findings.append(
                    inputs.finding(
                        "neighbours",
                        f"20-NN {kind}",
                        values[-1],
                        "%",
                        snapshot,
                        n,
                        settings,
                        digest,
                    )
                )
        found[snapshot.name] = (values[0], values[1])
    note = inputs.note(n, f" · bank of {len(rows):,} · {name}")
    return Part(findings, {"neighbours": lambda: figures.neighbours(found, note)})


def _in_turn(first: Snapshot, between: Iterator[Snapshot], last: Snapshot) -> Iterator[Snapshot]:
    yield first
    yield from between
    yield last


def classes(inputs: Inputs) -> Part:
    """Cosine within and between classes, and a map of the pictures (CLIM's figure; t-SNE)."""
    source = inputs.parts.queries
    rows = spread_over(len(source), inputs.options.num_pictures)
    images = centre_views(source, rows, inputs.views, inputs.device)
    kept, found = inputs.through(images, [each.encoder for each in inputs.snapshots])
    labels, names, n = source.labels[kept], source.classes, len(kept)
    numbers = torch.from_numpy(labels).to(inputs.device)
    digest, findings = inputs.parts.digest(), []
    within: dict[str, dict[str, float]] = {}
    between: dict[str, float] = {}
    for snapshot, rows_of in zip(inputs.snapshots, found, strict=True):
        alike = measures.intra_class_similarity(rows_of, numbers)
        if not alike:
            why = "no class has two of the pictures that were chosen"
            raise ClsaError("classes", why, "raise --num-pictures", Exit.BAD_DATA)
        within[snapshot.name] = {names[k]: value for k, value in alike.items()}
        between[snapshot.name] = measures.between_class_similarity(rows_of, numbers)
        mean = float(np.mean(list(alike.values())))
        values = {"within classes": mean, "between classes": between[snapshot.name]}
        values |= {"within less between": mean - between[snapshot.name]}
        values |= {f"within {name}": value for name, value in within[snapshot.name].items()}
        for name, value in values.items():
            findings.append(
                inputs.finding("classes", name, value, "cosine", snapshot, n, "features", digest)
            )
    chosen = spread_over(n, figures.MAX_TSNE)
    seed, note = inputs.options.seed, inputs.note(n, f" · {inputs.parts.name}")

    def maps() -> bytes:
        shown = {each.name: figures.tsne(_array(rows_of)[chosen], seed)
                 for each, rows_of in zip(inputs.snapshots, found, strict=True)}  # fmt: skip
        return figures.maps(shown, labels[chosen], names, note)

    draw = {"classes": lambda: figures.class_bars(within, between, note), "tsne": maps}
    return Part(findings, draw)


def spread(inputs: Inputs) -> Part:
    """Alignment, uniformity, RankMe and singular values of features, and of projections."""
    specs, rows = inputs.specs(), spread_over(len(inputs.source), inputs.options.num_pictures)
    encoders = [each.encoder for each in inputs.snapshots]
    images = centre_views(inputs.source, rows, inputs.views, inputs.device)
    kept, centres = inputs.through(images, encoders)
    first, second = (inputs.encoded(specs[kind], kept, encoders)[1] for kind in ("key", "weak"))
    seen = [
        (f"{snapshot.name} features", snapshot, three)
        for snapshot, *three in zip(inputs.snapshots, centres, first, second, strict=True)
    ]
    seen += [
        (
            f"{snapshot.name} projections",
            snapshot,
            [_projected(snapshot.query, each) for each in three],
        )
        for _, snapshot, three in seen
        if snapshot.query is not None
    ]
    found, spectra, findings, n = [], {}, [], len(kept)
    for name, snapshot, (centre, one, other) in seen:
        values = {
            "alignment": measures.alignment(one, other),
            "uniformity": measures.uniformity(centre),
            "rank": measures.rankme(centre),
            "spread": measures.feature_spread(centre),
        }
        kind = name.removeprefix(f"{snapshot.name} ")
        for what, value in values.items():
            findings.append(
                inputs.finding("spread", f"{what} of {kind}", value, "", snapshot, n, kind)
            )
        shown = (values["alignment"], values["uniformity"], values["rank"], centre.shape[1])
        found.append(figures.Spread(name, *shown))
        spectra[name] = _array(measures.singular_values(centre))
    note = inputs.note(n)
    draw = {
        "spread": lambda: figures.spread(found, note),
        "spectrum": lambda: figures.spectrum(spectra, note),
    }
    return Part(findings, draw)


def distortions(inputs: Inputs) -> Part:
    """Whether centre crops are still found after each strong operation at each magnitude."""
    networks = [snapshot.query or snapshot.encoder for snapshot in inputs.snapshots]
    rows = spread_over(len(inputs.source), inputs.options.num_distorted)
    kept, images = operations.clean_crops(inputs.source, rows, inputs.views, inputs.device)
    n, temperature, seed = len(kept), inputs.opened.temperature, inputs.options.seed
    if n < LEAST:
        why = f"only {n} of its pictures can be read"
        raise ClsaError(inputs.data.data, why, f"give {LEAST} or more", Exit.BAD_DATA)
    settings = f"temperature={temperature} bank={n}"
    findings, found = [], {}
    for snapshot, network in zip(inputs.snapshots, networks, strict=True):
        size = inputs.options.batch_size
        effects = operations.measure(network, images, kept, temperature, seed, size)
        found[snapshot.name] = effects

        def add(name: str, value: float, unit: str, of: Snapshot = snapshot) -> None:
            findings.append(inputs.finding("operations", name, value, unit, of, n, settings))

        for effect in effects:
            level = f" v={effect.level} {effect.text()}" if effect.level else ""
            name = f"{effect.operation}{level}"
            add(f"{name} retrieval", effect.retrieved, "%")
            add(f"{name} KL", effect.divergence, "nats")
            add(f"{name} cosine", effect.cosine, "cosine")
        add("mean retrieval", float(np.mean([each.retrieved for each in effects])), "%")
        add("mean KL", float(np.mean([each.divergence for each in effects])), "nats")
    note = inputs.note(n, f" · chance {100 / n:.2g} % · T = {temperature}")
    draw = {
        "operations": lambda: figures.operation_maps(found, figures.RETRIEVED, note),
        "operations-divergence": lambda: figures.operation_maps(found, figures.DIVERGENCE, note),
    }
    return Part(findings, draw)


PARTS: dict[str, Callable[[Inputs], Part]] = {
    "similarity": similarity,
    "neighbours": neighbours,
    "classes": classes,
    "spread": spread,
    "operations": distortions,
}
NEEDS_LABELS = ("neighbours", "classes")


@torch.no_grad()
def _projected(network: Network, features: Tensor) -> Tensor:
    """Unit projections from the features of the network's encoder."""
    return F.normalize(network.projector(features).float(), dim=1)


def _quantiles(values: Tensor) -> list[float]:
    places = torch.tensor(QUANTILES, dtype=torch.float64, device=values.device)
    return values.double().quantile(places).tolist()


def _array(values: Tensor) -> Any:
    return values.cpu().double().numpy()
