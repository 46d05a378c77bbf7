"""Base class of all options: frozen, typed, YAML in and out, the nearest name for a typo."""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import pydantic
import yaml

from clsa.system.errors import ClsaError, Exit

MAX_YAML_BYTES = 1 << 20

Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
Share = Annotated[float, pydantic.Field(gt=0, le=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
NotNegative = Annotated[float, pydantic.Field(ge=0)]
Count = Annotated[int, pydantic.Field(ge=1)]


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError(f"the lower value comes first, got {pair[0]:g} {pair[1]:g}")
    return pair


Range = Annotated[tuple[float, float], pydantic.AfterValidator(_rising)]
"""A lower and an upper value."""


def _limit(value: Any) -> Any:
    text = str(value) if type(value) is int else value
    if isinstance(text, str) and not re.fullmatch(r"[0-9]+|[0-9]+(\.[0-9]+)?\s?%", text):
        raise ValueError(f"expected a number such as 40 or a share such as 1%, got {value!r}")
    return text


Limit = Annotated[str, pydantic.BeforeValidator(_limit)]
"""A number of things, or their share in per cent: 40, 1%."""


class Config(pydantic.BaseModel):
    """Base class of all options: refuses unknown names, NaN, and text or booleans as numbers.

    pydantic's `strict` is not used: it would refuse the path strings and lists that YAML holds.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _keep_kinds(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        value = plain(value)
        kinds = _numbers_in(cls.model_fields[str(info.field_name)].annotation)
        accepted = kinds | ({int} if float in kinds else set())
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if kinds and item is not None and type(item) not in accepted:
                names = " or ".join(sorted(kind.__name__ for kind in kinds))
                raise ValueError(f"expected {names}, got {item!r}")
        return value

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Validate `values`.

        Raises:
            ClsaError: names `source`, the wrong key and, if it is unknown, the nearest valid key.
        """
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"] if str(part)[:1] != "<")  # no tag
            if first["type"] == "union_tag_invalid":
                context = first.get("ctx", {})
                what = f"{source}: {key}.name {context.get('tag', '').strip('<>')}"
                known = context.get("expected_tags", "").replace("<", "").replace(">", "")
                raise ClsaError(what, "no such method", f"use one of {known}") from None
            if first["type"] != "extra_forbidden":
                why = str(first["msg"]).removeprefix("Value error, ")
                what = f"{source}: {key or 'settings'}"
                raise ClsaError(what, why, "correct the value") from None
            names = list(flatten(cls.example(values)))
            same = [name for name in names if name.endswith(f".{key}")]
            groups = {name.rpartition(".")[0] for name in names}
            close = same[0] if same else nearest(key, [*names, *sorted(groups)])
            hint = f"did you mean {close}?" if close else "see --help for the names"
            raise ClsaError(f"{source}: {key}", "no such setting", hint) from None

    @classmethod
    def example(cls, values: dict[str, Any]) -> Self:
        """Default settings, which have all the names that `values` may use."""
        return cls.model_construct()

    def to_yaml(self) -> str:
        """The options as YAML that `read_yaml` can read."""
        return to_yaml(self.model_dump(mode="json"))


def plain(value: Any) -> Any:
    """`value` without the types of NumPy and torch: numbers, lists of them, the name of a device.

    Neither library is imported for it. Other values stay as they are.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    kind = type(value)
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return str(value) if (kind.__module__, kind.__name__) == ("torch", "device") else value


def _numbers_in(annotation: Any) -> set[type]:
    """Which of bool, int and float occur in an annotation, at any depth (`int | None`, tuples)."""
    if annotation in (bool, int, float):
        return {annotation}
    return set().union(*map(_numbers_in, get_args(annotation)))


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Values of all fields by their dotted names, including the fields of groups."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name, None)
        if isinstance(value, Config):
            values |= flatten(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def nearest(name: str, valid: list[str]) -> str | None:
    """The valid name most similar to `name`, or None if none is similar."""
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return matches[0] if matches else None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over` added or replacing its own, group by group."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


class _Loader(yaml.SafeLoader):
    """Reads numbers and booleans as YAML 1.2 does: 1e-3 is a number, `no` is a word.

    Refuses aliases and repeated keys.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are refused", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                problem = f"{key.value} appears twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader`, or a YAML 1.1 reader, would not read as text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("null", r"^(?:~|null|Null|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(loader.construct_scalar(node)),  # pyright: ignore[reportArgumentType]
)


def to_yaml(values: dict[str, Any]) -> str:
    """Nested settings as YAML that `read_yaml` can read; tuples become lists."""
    plain = json.loads(json.dumps(values))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)


def read_value(text: str) -> Any:
    """`text` read as one YAML value (a number, a word, a list in brackets), or else unchanged."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, KeyError, RecursionError):
        return text


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ClsaError: 66 if there is no such file; 2, with the line, if it is not a plain mapping.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ClsaError(str(path), "larger than 1 MB", "give a configuration file")
        values = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(str(path), why, "check the path", Exit.NO_INPUT) from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ClsaError(str(path), f"{line}{error.problem}", "correct the file") from None
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        why = f"not plain YAML ({type(error).__name__})"
        raise ClsaError(str(path), why, "correct the file") from None
    if not isinstance(values, dict):
        raise ClsaError(str(path), "holds no `name: value` lines", "see a run's config.yaml")
    return values
