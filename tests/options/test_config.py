"""Configuration: YAML in and out, strict types, and errors that name line, key and remedy."""

from pathlib import Path
from typing import Any

import pydantic
import pytest

from clsa.options.commands import EmbedOptions, EvaluateOptions
from clsa.options.config import MAX_YAML_BYTES, flatten, merge, nearest, read_yaml
from clsa.options.methods import KINDS, MoCoOptions
from clsa.options.run import OptimOptions, RunOptions
from clsa.recipes import RECIPES, resolve
from clsa.system.errors import ClsaError, Exit


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path, text: str | bytes) -> tuple[str, Exit]:
    """The error about a configuration file, without the file's name, and its exit code."""
    file = written(path / "c.yaml", text)
    with pytest.raises(ClsaError) as caught:
        resolve(read_yaml(file), str(file))
    message = str(caught.value)
    assert message.startswith(str(file)) and "\n" not in message and message.count(" - ") >= 2
    return message.removeprefix(str(file)), caught.value.code


# ---- written to YAML and read back


@pytest.mark.parametrize("name", RECIPES)
def test_config_yaml_gives_back_the_same_options(name: str, tmp_path: Path) -> None:
    options = resolve({"recipe": name, "out": str(tmp_path / "run"), "max_minutes": 0.5})
    file = written(tmp_path / "config.yaml", options.to_yaml())
    assert RunOptions.parse(read_yaml(file), "file") == options
    assert resolve(read_yaml(file)) == options
    assert resolve(read_yaml(file)).to_yaml() == options.to_yaml()


@pytest.mark.parametrize(
    "name",
    [
        *("1e3", "1.5e3", "08", "007", "1_000", "0x10", ".5", "+1", "1:30", "2024-01-01", "no"),
        *("~", "null", "true", "=", "<<", "", " a ", "a: b #c", "é ü 画", "a\udcffb", "a\nb", "-"),
    ],
)
def test_any_text_survives_the_file(name: str, tmp_path: Path) -> None:
    options = resolve({"data": {"data": name}})
    file = written(tmp_path / "config.yaml", options.to_yaml())
    assert resolve(read_yaml(file)).data.data == name


@pytest.mark.parametrize("value", [1e-3, 1e-5, 5e-4, 1e-12, 1.0, 3e20, 0.1])
def test_any_number_survives_the_file(value: float, tmp_path: Path) -> None:
    options = resolve({"optim": {"lr": value}})
    file = written(tmp_path / "config.yaml", options.to_yaml())
    assert resolve(read_yaml(file)).optim.lr == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E+2", 100.0), (".5", 0.5), ("3", 3.0), ("+2.", 2.0), ("6.0e-2", 0.06)],
)
def test_numbers_of_yaml_1_2(text: str, value: float, tmp_path: Path) -> None:
    file = written(tmp_path / "c.yaml", f"optim: {{lr: {text}}}")
    assert resolve(read_yaml(file)).optim.lr == value


def test_plain_words_stay_words(tmp_path: Path) -> None:
    text = "a: no\nb: on\nc: 2024-01-01\nd: 1:30\ne: 0x10\nf: ~\ng: true\nh: 012\n"
    assert read_yaml(written(tmp_path / "c.yaml", text)) == {
        "a": "no", "b": "on", "c": "2024-01-01", "d": "1:30", "e": "0x10", "f": None, "g": True,
        "h": 12,
    }  # fmt: skip


# ---- what is refused, and how


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", ": optim.lrr - no such setting - did you mean optim.lr?"),
        ("views: {weak: {size: [8]}}",
         ": views.weak.size - no such setting - did you mean views.weak.sizes?"),
        ("lr: 1", ": lr - no such setting - did you mean optim.lr?"),
        ("optimm: {lr: 1}", ": optimm - no such setting - did you mean optim?"),
        ("epoch: 1", ": epoch - no such setting - did you mean epochs?"),
        ("zzzzzz: 1", ": zzzzzz - no such setting - see --help for the names"),
        ("method: {queuesize: 1}",
         ": method.queuesize - no such setting - did you mean method.queue_size?"),
        ("recipe: swav-small\nmethod: {epsilom: 1}",
         ": method.epsilom - no such setting - did you mean method.epsilon?"),
        ("recipe: adco-small\nmethod: {name: adco, negative_rate: 1}",
         ": method.negative_rate - no such setting - did you mean method.negative_lr?"),
        ("recipe: simclr-small\nmethod: {queue_size: 9}",
         ": method.queue_size - no such setting - did you mean method.temperature?"),
        ("strong: {target_temperatur: 1}",
         ": strong.target_temperatur - no such setting - did you mean strong.target_temperature?"),
        ("views: {strong: {sizes: [8]}}",
         ": views.strong - no such setting - did you mean strong?"),
        ("views: {weak: {ops: {round: 2}}}",
         ": views.weak.ops.round - no such setting - did you mean views.weak.ops.rounds?"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_the_nearest(
    text: str, message: str, tmp_path: Path
) -> None:
    assert refusal(tmp_path, text) == (message, Exit.USAGE)


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ("optim: {lr: '0.1'}", "optim.lr", "expected float, got '0.1'"),
        ("optim: {lr: true}", "optim.lr", "expected float, got True"),
        ("optim: {lr: nan}", "optim.lr", "expected float, got 'nan'"),
        ("optim: {lr: .inf}", "optim.lr", "expected float, got '.inf'"),
        ("epochs: 2.0", "epochs", "expected int, got 2.0"),
        ("epochs: '2'", "epochs", "expected int, got '2'"),
        ("epochs: true", "epochs", "expected int, got True"),
        ("epochs: 1_000", "epochs", "expected int, got '1_000'"),
        ("max_steps: '5'", "max_steps", "expected int, got '5'"),
        ("max_steps: true", "max_steps", "expected int, got True"),
        ("max_minutes: '5'", "max_minutes", "expected float, got '5'"),
        ("compile: no", "compile", "expected bool, got 'no'"),
        ("compile: 1", "compile", "expected bool, got 1"),
        ("views: {weak: {sizes: ['16']}}", "views.weak.sizes", "expected int, got '16'"),
        ("views: {scale: [0.1, true]}", "views.scale", "expected float, got True"),
        ("epochs: 0", "epochs", "Input should be greater than or equal to 1"),
        ("optim: {lr: -1}", "optim.lr", "Input should be greater than 0"),
        ("seed: 99999999999999999999", "seed", f"Input should be less than {1 << 62}"),
        ("views: {scale: [0.9, 0.2]}", "settings", "views.scale: the smaller share comes first"),
        ("views: {scale: [0.9, 2]}", "views.scale.1", "Input should be less than or equal to 1"),
        ("views: {weak: {jitter: [0, 0, 0, 0.6]}}", "views.weak.jitter.3",
         "Input should be less than or equal to 0.5"),
        ("method: {bank: cue}", "method.bank", "Input should be 'queue' or 'batch+queue'"),
        ("recipe: swav-small\nmethod: {epsilon: -1}", "method.epsilon",
         "Input should be greater than 0"),
        ("recipe: pcl-small\nmethod: {num_clusters: [1]}", "method.num_clusters.0",
         "Input should be greater than or equal to 2"),
        ("strong: {sizes: []}", "settings", "--stronger needs strong views: set strong.sizes"),
        ("strong: {target: keys}", "strong.target", "Input should be 'query', 'key' or 'one-hot'"),
        ("views: {weak: {blur: 1.5}}", "views.weak.blur.0",
         "Input should be less than or equal to 1"),
        ("views: {weak: {blur: '0.5'}}", "views.weak.blur", "expected float, got '0.5'"),
        ("views: {weak: {blur: true}}", "views.weak.blur", "expected float, got True"),
        ("views: {weak: {solarize: [0.1, no]}}", "views.weak.solarize", "expected float, got 'no'"),
        ("views: 3", "views", "Input should be a valid dictionary or instance of ViewOptions"),
        ("1: 2", "1", "Keys should be strings"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(text: str, key: str, why: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text) == (f": {key} - {why} - correct the value", Exit.USAGE)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a appears twice"),
        ("optim:\n  lr: 1\n  lr: 2", "line 3: lr appears twice"),
        ("a: &x 1\nb: *x", "line 2: aliases are refused"),
        ("a: [1", "line 1: expected ',' or ']', but got '<stream end>'"),
        ("ok: 1\n\tbad: 2", "line 2: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        ("a: !!python/object:os.system x", "line 1: could not determine a constructor for the tag "
         "'tag:yaml.org,2002:python/object:os.system'"),
        ("- a\n- b", "holds no `name: value` lines"),
        ("words", "holds no `name: value` lines"),
        ("", "holds no `name: value` lines"),
        (b"a: \xff\xfe", "not plain YAML (UnicodeDecodeError)"),
        (b"a: \x00", "not plain YAML (ReaderError)"),
        ("a: " + "[" * 20_000, "not plain YAML (RecursionError)"),
        ("epochs: " + "9" * 5_000, "not plain YAML (ValueError)"),
        ("epochs: !!int x", "not plain YAML (ValueError)"),
        ("compile: !!bool maybe", "not plain YAML (KeyError)"),
        ("a: " + "x" * MAX_YAML_BYTES, "larger than 1 MB"),
    ],
)  # fmt: skip
def test_files_that_are_not_a_plain_mapping(text: str | bytes, why: str, tmp_path: Path) -> None:
    message, code = refusal(tmp_path, text)
    assert message.startswith(f" - {why} - ") and code == Exit.USAGE


def test_an_unknown_method_is_refused_with_a_list_of_all(tmp_path: Path) -> None:
    message, code = refusal(tmp_path, "method: {name: mocco}")
    assert message.startswith(": method.name mocco - ") and code == Exit.USAGE
    file = written(tmp_path / "c.yaml", "method: {name: mocco}")
    with pytest.raises(ClsaError) as caught:
        RunOptions.parse(read_yaml(file), "file")
    text = str(caught.value)
    assert text.startswith("file: method.name mocco - no such method - use one of 'moco', ")
    assert all(name in text for name in KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_method_has_its_own_options_by_name(name: str) -> None:
    options = RunOptions.parse({"method": {"name": name}}, "test")
    assert type(options.method) is KINDS[name] and options.method.name == name
    names = set(flatten(RunOptions.example({"method": {"name": name}})))
    assert {n.removeprefix("method.") for n in names if n.startswith("method.")} == set(
        KINDS[name].model_fields
    )
    with pytest.raises(ClsaError, match=r"^test: method\.zz - no such setting - "):
        RunOptions.parse({"method": {"name": name, "zz": 1}}, "test")


def test_without_a_name_the_method_is_moco() -> None:
    options = RunOptions.parse({"method": {"queue_size": 9}}, "test")
    assert options.method == MoCoOptions(queue_size=9)


def test_one_number_holds_for_all_views() -> None:
    for given, wanted in ((0.25, (0.25,)), (1, (1.0,)), ([0.5, 0], (0.5, 0.0))):
        weak = resolve({"views": {"weak": {"blur": given, "solarize": given}}}).views.weak
        assert weak.blur == weak.solarize == wanted


def test_a_missing_file_and_a_folder_are_missing_input(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ClsaError, match=why) as caught:
            read_yaml(path)
        assert caught.value.code == Exit.NO_INPUT


def test_the_billion_laughs_attack_is_refused(tmp_path: Path) -> None:
    laughs = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in ("ab", "bc", "cd"))
    assert "aliases are refused" in refusal(tmp_path, laughs)[0]


def test_options_are_frozen() -> None:
    options = resolve({})
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        options.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        options.optim.lr = 3.0  # pyright: ignore[reportAttributeAccessIssue]


def test_types_are_checked_in_python_too() -> None:
    for values in ({"lr": "1"}, {"lr": float("nan")}, {"lr": float("inf")}, {"momentum": False}):
        with pytest.raises(pydantic.ValidationError):
            OptimOptions(**values)  # pyright: ignore[reportArgumentType]
    assert OptimOptions(lr=1).lr == 1.0


# ---- small functions


def test_flatten_gives_dotted_names_of_every_field() -> None:
    values = flatten(resolve({}))
    assert values["strong.pool"] == "official" and values["optim.lr"] == 0.06
    assert values["views.weak.ops.rounds"] == 0 and values["method.queue_size"] == 4096
    assert not any(isinstance(value, pydantic.BaseModel) for value in values.values())
    assert "views.weak.jitter" in flatten(RunOptions.model_construct())
    for kind in (EvaluateOptions, EmbedOptions):
        assert flatten(kind.model_construct())["run"] is None


def test_merge_puts_groups_together_and_changes_nothing() -> None:
    base: dict[str, Any] = {"a": {"x": 1, "y": 2}, "b": 1}
    assert merge(base, {"a": {"y": 3}, "c": {"z": 4}}) == {
        "a": {"x": 1, "y": 3},
        "b": 1,
        "c": {"z": 4},
    }
    assert merge(base, {"a": 5, "b": {"q": 1}}) == {"a": 5, "b": {"q": 1}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 1}


def test_nearest() -> None:
    names = ["moco-v2", "clsa", "clsa-small"]
    assert nearest("clsa-smal", names) == "clsa-small" and nearest("mocov2", names) == "moco-v2"
    assert nearest("xyzzy", names) is None
