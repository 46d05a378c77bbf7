"""Figures of diagnostics: each function turns numbers into the bytes of a PNG (matplotlib).

The main colours are Okabe and Ito's, which colour-blind readers can tell apart. Nothing here keeps
state, so figures can be drawn anywhere and in any order.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from clsa.diagnose.operations import OPERATIONS, SWITCHES, Effect
from clsa.system.extras import require

WEAK, STRONG = "#0072B2", "#D55E00"
RANDOM, TRAINED = "#8C8C8C", "#009E73"
OTHER = "#D0D0D0"
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#000000", "#8B5A2B", "#6A3D9A", "#B8A800", "#1B4F3A", "#A50F15",
)  # fmt: skip
MARKERS = ("o", "s", "^")
MAX_NAMED = 12
MAX_BARS = 24
MAX_TSNE = 2000
MOST_BINS = 60
DPI = 110


class Spread(NamedTuple):
    """Numbers about how the rows of one encoder are spread over the sphere."""

    name: str
    """Encoder and kind of rows, as shown under the bar."""
    alignment: float
    uniformity: float
    rank: float
    width: int
    """Width of a row, an upper bound of the rank."""


class Curve(NamedTuple):
    """One number for each weak and each strong query of an encoder."""

    name: str
    weak: Float[np.ndarray, " n"]
    strong: Float[np.ndarray, " n"]


def _figure(width: float, height: float, title: str, note: str) -> Any:
    figure = require("matplotlib.figure", "plots", "figures").Figure(
        figsize=(width, height), dpi=DPI, layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "plots", "figures").FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def _axes(figure: Any, rows: int, columns: int, **shared: Any) -> np.ndarray:
    """A grid of plots without upper and right frame lines, always a two-dimensional array."""
    found = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in found.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return found


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def similarity(
    positives: Sequence[Curve], variances: Sequence[Curve], num_negatives: int, note: str
) -> bytes:
    """Histograms of P+ and Var- on a log scale, one column per encoder (CLSA Fig. 3 and 6).

    Args:
        positives, variances: P+ and Var- of the same encoders, in the same order.
        num_negatives: K; P+ at chance is 1 / (K + 1).
        note: small print below: run, number of pictures, seed.
    """
    title = "Do strong queries find their picture as well as weak ones? (apart = no)"
    figure = _figure(5 * len(positives), 6, title, note)
    axes = _axes(figure, 2, len(positives))
    labels = ("P₊, probability of the positive key", "Var₋, variance of the negatives' probability")
    for row, (curves, label) in enumerate(zip((positives, variances), labels, strict=True)):
        for axis, curve in zip(axes[row], curves, strict=True):
            _histograms(axis, curve)
            axis.set_xlabel(label, fontsize=9)
            axis.set_ylabel("queries", fontsize=9)
            axis.set_title(f"{curve.name} encoder", fontsize=10, loc="left")
    chance = 1 / (num_negatives + 1)
    for axis in axes[0]:
        axis.axvline(chance, color="black", linestyle=":", linewidth=1, label="chance, 1/(K+1)")
    for axis in axes.flat:
        axis.legend(fontsize=8, frameon=False, loc="best")
    return _png(figure)


def _histograms(axis: Any, curve: Curve) -> None:
    tiny = np.finfo(np.float64).tiny
    weak, strong = (np.maximum(values, tiny) for values in (curve.weak, curve.strong))
    low, high = np.quantile(np.concatenate([weak, strong]), [0.001, 1.0])
    if high < low * 1.01:  # all values are equal
        low, high = low / 1.1, high * 1.1
    edges = np.geomspace(low, high, int(np.clip(1.5 * len(weak) ** 0.5, 12, MOST_BINS)))
    for values, color, name in ((weak, WEAK, "weak"), (strong, STRONG, "strong")):
        shown = np.clip(values, low, high)
        axis.hist(shown, edges, histtype="stepfilled", color=color, alpha=0.3)
        axis.hist(shown, edges, histtype="step", color=color, linewidth=1.4)
        label = f"{name}, median {np.median(values):.2g}"
        axis.axvline(np.median(values), color=color, linewidth=1.2, linestyle="--", label=label)
    axis.set_xscale("log")
    axis.tick_params(which="minor", labelbottom=False)
    if high < 30 * low:  # too narrow for ticks at powers of ten
        ticks = np.geomspace(low, high, 4)
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], minor=False)
        axis.set_xticks([], minor=True)


def neighbours(found: Mapping[str, tuple[float, float]], note: str) -> bytes:
    """Bars of 20-NN accuracy for centre crops and strong queries of each encoder (CLSA Fig. 5).

    Args:
        found: by encoder, in drawing order: accuracy of centre crops and of strong queries in
            percent.
        note: small print.
    """
    title = "How much accuracy do strong distortions cost? (20-NN on clean pictures)"
    figure = _figure(max(6.5, 1.3 * len(found) + 2), 4, title, note)
    axis = _axes(figure, 1, 1)[0, 0]
    places = np.arange(len(found))
    values = np.array(list(found.values()))
    names = ("centre crops", "strongly augmented")
    for k, (name, color) in enumerate(zip(names, (WEAK, STRONG), strict=True)):
        bars = axis.bar(places + (k - 0.5) * 0.4, values[:, k], 0.38, color=color, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(places, list(found))
    axis.set_ylabel("20-NN top-1 in percent", fontsize=9)
    axis.margins(y=0.12)
    axis.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    return _png(figure)


def tsne(features: Float[np.ndarray, "n F"], seed: int) -> Float[np.ndarray, "n 2"]:
    """Map pictures to a plane so that similar ones stay close (t-SNE, scikit-learn).

    It starts from the first two principal components. The distance is cosine; the perplexity is 30,
    or less for fewer than 91 pictures. The same input gives the same output on one machine.

    Args:
        features: at least 4 rows, at most `MAX_TSNE`.
        seed: of the optimisation.
    """
    library = require("sklearn.manifold", "plots", "t-SNE")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    rows = features.astype(np.float64) / np.maximum(lengths, 1e-12)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    # 2 - 2 cos = |a - b|^2 of unit rows, so Euclidean distance (init="pca" needs it) will do
    model = library.TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=1)
    return np.asarray(model.fit_transform(rows - rows.mean(0)), np.float64)


def maps(
    places: Mapping[str, Float[np.ndarray, "n 2"]],
    labels: Int64[np.ndarray, " n"],
    classes: list[str],
    note: str,
) -> bytes:
    """t-SNE maps, one panel per encoder; the `MAX_NAMED` largest classes in colour, others gray.

    Args:
        places: by encoder, coordinates of the same pictures.
        labels: class numbers, -1 if unknown.
        classes: names of the classes.
        note: small print.
    """
    title = "Are pictures of a class close together? (t-SNE: only closeness has meaning)"
    figure = _figure(5 * len(places) + 1.6, 5, title, note)
    axes = _axes(figure, 1, len(places))[0]
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    named = [k for k in np.argsort(-counts, kind="stable")[:MAX_NAMED] if counts[k]]
    for axis, (name, found) in zip(axes, places.items(), strict=True):
        rest = ~np.isin(labels, named)
        if rest.any():
            axis.scatter(*found[rest].T, s=5, color=OTHER, linewidths=0, label="other")
        for place, k in enumerate(sorted(named, key=lambda k: classes[k])):
            mine, marker = found[labels == k], MARKERS[place % len(MARKERS)]
            color = PALETTE[place % len(PALETTE)]
            axis.scatter(*mine.T, s=16, color=color, marker=marker, linewidths=0, label=classes[k])
        axis.set_title(f"{name} encoder", fontsize=10, loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[["left", "bottom"]].set_visible(False)
    handles, names = axes[-1].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right center", fontsize=8, frameon=False, markerscale=1.6
    )
    return _png(figure)


def class_bars(
    found: Mapping[str, Mapping[str, float]], between: Mapping[str, float], note: str
) -> bytes:
    """Bars of the mean cosine within each class; they start at the mean cosine between classes.

    Args:
        found: mean cosine within a class, by encoder, then by name of the class. Of more than
            `MAX_BARS` classes an evenly spaced choice is drawn, from the most to the least alike.
        between: mean cosine between different classes, by encoder.
        note: small print.
    """
    title = "Are pictures of a class more alike than other pictures? (bars to the right = yes)"
    last = found[list(found)[-1]]
    order = sorted(last, key=lambda name: last[name])
    if len(order) > MAX_BARS:
        note += f" · {MAX_BARS} of {len(order)} classes, from the most to the least alike"
        order = [order[i] for i in np.linspace(0, len(order) - 1, MAX_BARS).round().astype(int)]
    figure = _figure(4.8 * len(found), 5.4, title, note)
    axes = _axes(figure, 1, len(found), sharex=True, sharey=True)[0]
    for axis, (name, values) in zip(axes, found.items(), strict=True):
        start, mean = between[name], float(np.mean(list(values.values())))
        start = 0.0 if np.isnan(start) else start  # NaN: there is only one class
        lengths = [values[each] - start for each in order]
        axis.barh(order, lengths, left=start, color=RANDOM if name == "random" else TRAINED)
        axis.axvline(start, color=STRONG, linestyle="--", linewidth=1.2)
        axis.axvline(mean, color="black", linewidth=1)
        axis.set_title(f"{name} encoder", fontsize=10, loc="left")
        means = f"dashed: between classes {between[name]:.3f}, solid: within {mean:.3f}"
        axis.set_xlabel(f"mean cosine of two pictures of the class\n{means}", fontsize=9)
    return _png(figure)


def spread(found: Sequence[Spread], note: str) -> bytes:
    """Bars of alignment, uniformity and RankMe for each encoder."""
    title = "Are views of a picture close, pictures spread? (good: left two low, right one high)"
    figure = _figure(3.2 * 3, 3.6, title, note)
    axes = _axes(figure, 1, 3)[0]
    kinds = (
        ("alignment", "mean |a - b|² of two weak views", "%.3f"),
        ("uniformity", "ln mean exp(-2 |f - f'|²)", "%.3f"),
        ("rank", "RankMe, effective rank", "%.1f"),
    )
    for axis, (name, label, form) in zip(axes, kinds, strict=True):
        values = [getattr(each, name) for each in found]
        colors = [RANDOM if each.name.startswith("random") else TRAINED for each in found]
        bars = axis.bar(range(len(found)), values, 0.6, color=colors)
        axis.bar_label(bars, fmt=form, fontsize=8, padding=2)
        of = [f"\n(of {each.width})" if name == "rank" else "" for each in found]
        ticks = [each.name.replace(" ", "\n") + more for each, more in zip(found, of, strict=True)]
        axis.set_xticks(range(len(found)), ticks, fontsize=8)
        axis.set_ylabel(label, fontsize=9)
        axis.margins(y=0.15)
    return _png(figure)


def spectrum(found: Mapping[str, Float[np.ndarray, " r"]], note: str) -> bytes:
    """Singular values as shares of the largest one, in falling order, on a log scale.

    Args:
        found: singular values, largest first, by encoder and kind of rows.
        note: small print.
    """
    title = "In how many directions do features vary? (slow decay = many)"
    figure = _figure(7, 4.2, title, note)
    axis = _axes(figure, 1, 1)[0, 0]
    for name, values in found.items():
        share = np.maximum(values / max(values[0], np.finfo(np.float64).tiny), 1e-8)
        color = RANDOM if name.startswith("random") else TRAINED
        line = "--" if name.endswith("projections") else "-"
        axis.plot(np.arange(1, len(share) + 1), share, line, color=color, linewidth=1.6, label=name)
    axis.set_yscale("log")
    axis.set_xlabel("number of the singular value", fontsize=9)
    axis.set_ylabel("singular value / largest", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return _png(figure)


RETRIEVED = ("retrieved", "share of pictures found again in percent", "cividis")
DIVERGENCE = ("divergence", "KL in nats", "cividis_r")


def operation_maps(
    found: Mapping[str, Sequence[Effect]], measure: tuple[str, str, str], note: str
) -> bytes:
    """14 operations by magnitude, one panel per encoder; dark cells mark a strong effect.

    Args:
        found: results of `operations.measure` by encoder.
        measure: `RETRIEVED` or `DIVERGENCE`: field of `Effect`, its label, colour map.
        note: small print.
    """
    field, label, colors = measure
    verb = "break retrieval" if field == "retrieved" else "change similarities"
    scale = "" if field == "retrieved" else f"; {label}; own scale per panel"
    title = f"Which distortions {verb}? (dark = they do; weakest left, strongest right{scale})"
    figure = _figure(5.6 * len(found) + 1.2, 6.4, title, note)
    axes = _axes(figure, 1, len(found), sharey=True)[0]
    width = 1 + max(each.strength for effects in found.values() for each in effects)
    grids = {}
    for name, effects in found.items():
        grids[name] = np.full((len(OPERATIONS), width), np.nan)
        for each in effects:
            row, value = OPERATIONS.index(each.operation), getattr(each, field)
            grids[name][row, slice(None) if each.operation in SWITCHES else each.strength] = value
    image, share = None, field == "retrieved"
    for axis, (name, effects) in zip(axes, found.items(), strict=True):
        top = 100.0 if share else np.nanmax(grids[name]) or 1.0
        image = axis.imshow(grids[name], cmap=colors, vmin=0, vmax=top, aspect="auto")
        for each in effects:
            value = getattr(each, field)
            text = f"{value:.0f}" if share else f"{value:.2g}"
            _write_cell(axis, each, text, image.cmap(image.norm(value)), width)
        axis.set_yticks(range(len(OPERATIONS)), OPERATIONS, fontsize=9)
        axis.set_xticks(range(width), ["weakest", *[""] * (width - 2), "strongest"], fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(f"{name} encoder", fontsize=10, loc="left")
        if not share:  # values of an untrained encoder are a hundredth of a trained one's
            figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02).ax.tick_params(labelsize=8)
    if share:
        figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.01).set_label(label, fontsize=9)
    return _png(figure)


def _write_cell(
    axis: Any, effect: Effect, text: str, color: tuple[float, float, float, float], width: int
) -> None:
    """Write the value and below it the magnitude: black on light cells, white on dark ones."""
    red, green, blue, _ = color
    ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
    switch = effect.operation in SWITCHES
    column = (width - 1) / 2 if switch else effect.strength
    row = OPERATIONS.index(effect.operation)
    magnitude = "on" if switch else effect.text()
    middle = {"ha": "center", "va": "center", "color": ink}
    axis.text(column, row - 0.14, text, fontsize=9, **middle)
    axis.text(column, row + 0.28, magnitude, fontsize=6.5, **middle)
