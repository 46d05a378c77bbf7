"""Which views of a picture a step needs: the size, the crop and the operations of each."""

from collections.abc import Sequence
from typing import NamedTuple

from clsa.options.run import Operations, RunOptions, StrongOptions, ViewOptions, WeakViews
from clsa.system.errors import ClsaError

EVAL_SCALE = (0.2, 1.0)


STRONG_EVAL_VIEW = 1000


Scale = tuple[float, float]


class ViewSpec(NamedTuple):
    """One view of every picture of a batch: everything that decides its crops and pixels."""

    name: str
    """key, weak0, weak1, ..., local0, ..., strong0, ..."""
    size: int
    """Side in pixels."""
    scale: tuple[float, float]
    """Range of the share of the picture's area that a crop takes."""
    view: int
    """Stream of random numbers that it draws from."""
    weak: WeakViews = WeakViews()
    """Jitter, grayscale and flip."""
    blur: float = 0.0
    """Probability of blur."""
    solarize: float = 0.0
    """Probability of solarizing."""
    ops: Operations = Operations(rounds=0)
    """Operations that follow the weak recipe."""
    centre: float = 0.0
    """Above 0: no random crop, but the centre square with this share of the short side."""


def _spec(options: ViewOptions, name: str, size: int, scale: Scale, view: int) -> ViewSpec:
    weak = options.weak
    blur, solarize = (each[min(view, len(each) - 1)] for each in (weak.blur, weak.solarize))
    return ViewSpec(name, size, scale, view, weak, blur, solarize, weak.ops)


def _scale_at(options: ViewOptions, size: int) -> Scale:
    low, high = options.scale
    share = size / options.size
    return low * share, min(high * share, 1.0)


def weak_specs(
    options: ViewOptions, keyed: bool = False, least: int = 1, most: int | None = None
) -> list[ViewSpec]:
    """The weak views of a step: one of `options.size`, then `weak.sizes`, then `local.sizes`.

    Args:
        keyed: name the first view `key`, as in MoCo.
        least, most: how many views the method takes; local views count only towards `most`.

    Raises:
        ClsaError: for fewer than `least` views, or more than `most`.
    """
    sizes, local = (options.size, *options.weak.sizes), options.local
    count = len(sizes) + len(local.sizes)
    if len(sizes) < least or count > (most or count):
        wanted = f"{least}" if least == most else f"at least {least}"
        here = f"there are {len(sizes)} (views.size is one) and {len(local.sizes)} local ones"
        why = f"this method takes {wanted} weak views of a picture, but {here}"
        raise ClsaError("views.weak.sizes", why, "change it or views.local.sizes to match")
    named = [
        (f"weak{i - keyed}" if i or not keyed else "key", size) for i, size in enumerate(sizes)
    ]
    specs = [
        _spec(options, name, size, _scale_at(options, size), view)
        for view, (name, size) in enumerate(named)
    ]
    return specs + [
        _spec(options, f"local{i}", size, local.scale, len(sizes) + i)
        for i, size in enumerate(local.sizes)
    ]


def view_sizes(options: RunOptions) -> set[int]:
    """Sides in pixels of all pictures that the encoder of a run may be shown."""
    views, patch = options.views, getattr(options.method, "patch_size", None)  # PIRL's jigsaw
    sizes = {views.size, *views.weak.sizes, *views.local.sizes}
    sizes.update(options.strong.sizes if options.stronger else ())
    sizes.update(options.mixture.resolutions if options.clim else ())
    return sizes | ({patch} if patch else set())


def at_sizes(specs: list[ViewSpec], sizes: Sequence[int]) -> list[ViewSpec]:
    """The same views with the same crops and draws, repeated at each of these sizes (CLIM)."""
    return [spec._replace(name=f"{spec.name} {s}", size=s) for s in sizes for spec in specs]


def strong_specs(options: ViewOptions, strong: StrongOptions, first_view: int) -> list[ViewSpec]:
    """The strong views of a step: the weak recipe, then `strong`'s operations.

    Args:
        first_view: stream of random numbers of the first strong view; the others follow.
    """
    return [
        _spec(options, f"strong{i}", size, _scale_at(options, size), first_view + i)._replace(
            ops=strong
        )
        for i, size in enumerate(strong.sizes)
    ]


def centre_spec(options: ViewOptions, view: int) -> ViewSpec:
    """The centre crop of evaluation as a training view, without any pixel operation."""
    plain = WeakViews(jitter_probability=0.0, grayscale=0.0, flip=0.0)
    spec = ViewSpec("anchor", options.size, options.scale, view, plain)
    return spec._replace(centre=options.eval_crop)


def strong_eval_spec(options: ViewOptions) -> ViewSpec:
    """The strong view of evaluation, the same for all recipes so that they can be compared.

    It uses the default weak and strong operations, without blur; only its size is the recipe's.
    """
    spec = ViewSpec("strong-eval", options.size, EVAL_SCALE, STRONG_EVAL_VIEW)
    return spec._replace(ops=Operations())
