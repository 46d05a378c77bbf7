"""Named runs: what each sets apart from the defaults of `options`.

In comes a name such as `clsa-small`, and the options that the user sets. Out go all options of a
run.

    recipe.py    what a recipe is
    imagenet.py  as published, 224 pixels
    cifar.py     32 pixels, ResNet-18
    small.py     32 pixels, for a CPU
    wrappers.py  CLIM, SuNCEt and continual pretraining, at all three sizes
"""

from clsa.options.config import merge, nearest
from clsa.options.run import RunOptions
from clsa.recipes.cifar import CIFAR
from clsa.recipes.imagenet import IMAGENET
from clsa.recipes.recipe import Overrides, Recipe
from clsa.recipes.small import SMALL
from clsa.recipes.wrappers import AROUND
from clsa.system.errors import ClsaError

RECIPES: dict[str, Recipe] = {
    **IMAGENET,
    **{f"{name}-cifar": recipe for name, recipe in CIFAR.items()},
    **{f"{name}-small": recipe for name, recipe in SMALL.items()},
    **AROUND,
}


def overrides_of(name: str) -> Overrides:
    """The options that recipe `name` sets.

    Raises:
        ClsaError: for an unknown name; it suggests the nearest one.
    """
    if name not in RECIPES:
        close = nearest(name, list(RECIPES))
        hint = f"did you mean {close}?" if close else "`clsa recipes` lists them"
        raise ClsaError(f"recipe {name}", "no such recipe", hint)
    return {**RECIPES[name].values, "recipe": name}


def resolve(values: Overrides, source: str = "options") -> RunOptions:
    """Options from `values`; what they leave out comes from the recipe they name, then defaults.

    Another `views.size` moves all views of the recipe (`resized`), but not those in `values`.

    Args:
        values: options by name, groups nested; `recipe` names the recipe.
        source: where the values come from, for error messages.

    Raises:
        ClsaError: for an unknown recipe or option, or a wrong value.
    """
    name = str(values.get("recipe", RunOptions.model_fields["recipe"].default))
    overrides, given = overrides_of(name), values.get("method")
    method = given.get("name") if isinstance(given, dict) else None
    if method not in (None, overrides["method"]["name"]):
        suffix = next((form for form in ("-small", "-cifar") if name.endswith(form)), "")
        close = nearest(f"{method}{suffix}", list(RECIPES))
        why = f"{name} is a recipe for {overrides['method']['name']}"
        hint = f"choose another --recipe, perhaps {close}" if close else "choose another --recipe"
        raise ClsaError(f"{source}: method.name {method}", why, hint)
    size = values.get("views", {}).get("size") if isinstance(values.get("views"), dict) else None
    if type(size) is int and size > 0:
        overrides = resized(RunOptions.parse(overrides, source), overrides, size)
    return RunOptions.parse(merge(overrides, values), source)


def resized(options: RunOptions, overrides: Overrides, size: int) -> Overrides:
    """`overrides` with every view in the same relation to `size` as in `options` to `views.size`.

    A view of the full size gets the new one; others are rounded to multiples of 4, at least 8.

    Args:
        options: what `overrides` resolve to.
    """
    before = options.views.size

    def moved(sides: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            size if side == before else max(8, 4 * round(side * size / before / 4))
            for side in sides
        )

    if size == before:
        return overrides
    views = options.views
    sizes = {
        "weak": {"sizes": moved(views.weak.sizes)},
        "local": {"sizes": moved(views.local.sizes)},
    }
    strong, resolutions = moved(options.strong.sizes), moved(options.mixture.resolutions)
    own = {"strong": {"sizes": strong}, "mixture": {"resolutions": resolutions}}
    return merge(overrides, {"views": sizes, **own})


def describe_recipe(name: str) -> str:
    """Three lines about a recipe: what it is, the source of its values and its cost, results."""
    recipe, options = RECIPES[name], resolve({"recipe": name})
    strong = options.strong.sizes if options.stronger else ()
    sizes = [options.views.size, *options.views.weak.sizes, *options.views.local.sizes, *strong]
    views = " + ".join(f"{sizes.count(size)} x {size}" for size in dict.fromkeys(sizes))
    cost = f"{options.epochs} epochs of batch {options.batch_size}, views of {views} pixels"
    published = f"published: {recipe.published}" if recipe.published else "no published figure"
    measured = f"measured: {recipe.measured}" if recipe.measured else "not measured here"
    lines = [recipe.text, f"values: {recipe.source}; {cost}", f"{published}; {measured}"]
    return f"{name:28}" + ("\n" + " " * 28).join(lines)
