"""Base class of every configuration: frozen, typed, YAML in and out, nearest name for an unknown one."""

import difflib
import re
from pathlib import Path
from typing import Any, Self, get_args

import pydantic
import yaml

from clsa.errors import ClsaError, Exit

MAX_YAML_BYTES = 1 << 20


class Config(pydantic.BaseModel):
    """Frozen and typed; refuses unknown names, NaN, and numbers written as text or as booleans.

    Not pydantic's `strict`, which would refuse the path strings and lists that YAML holds.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _keep_kinds(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)} & {bool, int, float}
        if value is None or not kinds or isinstance(value, (list, tuple, dict, pydantic.BaseModel)):
            return value
        accepted = int in kinds and type(value) is int
        accepted |= float in kinds and type(value) in (int, float)
        accepted |= bool in kinds and type(value) is bool
        accepted |= str in get_args(annotation) and isinstance(value, str)
        if not accepted:
            names = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"expected {names}, got {value!r}")
        return value

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Validate `values`; an error names `source`, the key and the nearest valid key."""
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] != "extra_forbidden":
                why = str(first["msg"]).removeprefix("Value error, ")
                raise ClsaError(f"{source}: {key or 'settings'}", why, "correct the value") from None
            close = nearest(key, list(flatten(cls.model_construct())))
            hint = f"did you mean {close}?" if close else "see --help for the names"
            raise ClsaError(f"{source}: {key}", "no such setting", hint) from None

    def to_yaml(self) -> str:
        """The configuration as YAML, readable by `from_yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of every field, groups opened."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name, None)
        if isinstance(value, Config):
            values |= flatten(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def nearest(name: str, valid: list[str]) -> str | None:
    """The valid name most like `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return matches[0] if matches else None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over` put on top, group by group."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers and booleans (1e-3 is a number, `no` a word); no aliases, no repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are refused", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key.value} twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("null", r"^(?:~|null|Null|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node))
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ClsaError: 66 when there is no such file, 2 when it is not a plain mapping; with the line.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ClsaError(str(path), "larger than 1 MB", "give a configuration file")
        values = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(str(path), why, "check the path", Exit.NO_INPUT) from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ClsaError(str(path), f"{line}{error.problem}", "correct the file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClsaError(str(path), f"not YAML ({type(error).__name__})", "correct the file") from None
    if not isinstance(values, dict):
        raise ClsaError(str(path), "holds no `name: value` lines", "see a run's config.yaml")
    return values
