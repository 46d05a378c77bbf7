"""Checkpoints: all or nothing on disk, damage noticed, nothing executed, one digest for a state."""

import copy
import errno
import json
import os
import pickle
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import clsa
from clsa.learning.models import build_encoder
from clsa.learning.optim import build_optimizer
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.options.run import DataOptions, ModelOptions, ViewOptions
from clsa.recipes import resolve
from clsa.runs import checkpoint, digests, saved_encoder
from clsa.system import files
from clsa.system.errors import ClsaError, Exit

SMALL = {"encoder": "resnet10-w32", "projector_hidden": 16, "projector_dim": 8, "norm_groups": 1}


def save(folder: Path, *steps: int, keep: tuple[int, ...] = ()) -> None:
    for step in steps:
        state = {"step": step, "rows": torch.full((4,), float(step))}
        checkpoint.save(
            folder, checkpoint.name_of(checkpoint.STEP, step), state, {"keep": step in keep}
        )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(action: Callable[[], object]) -> tuple[str, Exit]:
    with pytest.raises(ClsaError) as caught:
        action()
    return str(caught.value), caught.value.code


class Bomb:
    """Creates the file MARKER when unpickled by a loader that trusts."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


# ---- manifests


def test_a_saved_state_comes_back_with_its_manifest(tmp_path: Path) -> None:
    save(tmp_path / "new", 3)
    saved = checkpoint.load_newest(tmp_path / "new")
    assert saved and saved.skipped == [] and saved.path == tmp_path / "new" / "step-000003.ckpt"
    assert saved.state["step"] == 3 and saved.state["rows"].tolist() == [3.0] * 4
    manifest = json.loads(saved.path.with_suffix(".json").read_text())
    assert manifest["bytes"] == saved.path.stat().st_size and manifest["keep"] is False
    assert len(manifest["sha256"]) == 64


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "missing") is None
    assert checkpoint.load_newest(tmp_path) is None
    save(tmp_path, 1)
    (tmp_path / "step-000001.json").unlink()  # killed before the commit
    assert checkpoint.load_newest(tmp_path) is None


def test_the_manifest_is_the_commit(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-000002.json").unlink()
    saved = checkpoint.load_newest(tmp_path)
    assert saved and saved.state["step"] == 1 and saved.skipped == []


def test_newest_goes_by_number_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 999_999, 1_000_000)
    saved = checkpoint.load_newest(tmp_path)
    assert saved and saved.state["step"] == 1_000_000


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": Path.unlink,
    "manifest cut": lambda path: path.with_suffix(".json").write_text('{"sha256": "ab'),
    "manifest emptied": lambda path: path.with_suffix(".json").write_text(""),
    "manifest of a list": lambda path: path.with_suffix(".json").write_text("[]"),
    "manifest without hash": lambda path: path.with_suffix(".json").write_text("{}"),
    "manifest of bytes": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_to_the_previous_and_says_so(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    DAMAGE[damage](tmp_path / "step-000003.ckpt")
    saved = checkpoint.load_newest(tmp_path)
    assert saved and saved.state["step"] == 2
    why = "No such file" if damage == "removed" else "sha256 mismatch"
    assert len(saved.skipped) == 1
    assert saved.skipped[0].startswith("step-000003: ") and why in saved.skipped[0]
    save(tmp_path, 4)
    checkpoint.prune(tmp_path)  # does not trip over the damaged one


def test_no_whole_checkpoint_is_missing_input(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip(tmp_path / "step-000001.ckpt")
    flip(tmp_path / "step-000002.ckpt")
    message, code = refused(lambda: checkpoint.load_newest(tmp_path))
    assert code == Exit.NO_INPUT and "step-000001: sha256 mismatch" in message
    assert "step-000002: sha256 mismatch" in message and "\n" not in message


def test_prune_keeps_the_newest_two_those_marked_keep_and_the_newest_best(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep=(2,))
    for step in (3, 1, 10):
        name = checkpoint.name_of(checkpoint.BEST, step)
        checkpoint.save(tmp_path, name, {"step": step}, {"keep": False})
    checkpoint.prune(tmp_path)
    kept = ["best-000010", "step-000002", "step-000004", "step-000005"]
    assert names(tmp_path) == [f"{name}{end}" for name in kept for end in (".ckpt", ".json")]
    assert all(checkpoint._load_verified(tmp_path / f"{name}.json") for name in kept)
    checkpoint.prune(tmp_path)
    assert len(names(tmp_path)) == 8


def test_a_checkpoint_under_a_wrong_name_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for suffix in (".ckpt", ".json"):
        (tmp_path / f"step-000002{suffix}").rename(tmp_path / f"step-000007{suffix}")
    saved = checkpoint.load_newest(tmp_path)
    assert saved and saved.state["step"] == 1 and saved.skipped == ["step-000007: holds step 2"]


def test_prune_deletes_uncommitted_checkpoints_and_no_other_files(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / "step-000002.json").unlink()
    for name in ("notes.ckpt", "best-000004.ckpt", "stage-1"):
        (tmp_path / name).write_text("")
    assert checkpoint.prune(tmp_path) == []
    kept = ["step-000001.ckpt", "step-000001.json", "step-000003.ckpt", "step-000003.json"]
    assert names(tmp_path) == ["notes.ckpt", "stage-1", *kept]


def test_a_refused_manifest_leaves_no_data_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        with files.output_errors(path):
            raise OSError(errno.ENOSPC, "full")

    save(tmp_path, 1)
    monkeypatch.setattr(files, "write_text", refuse)
    assert refused(lambda: save(tmp_path, 2))[1] == Exit.IO
    assert names(tmp_path) == ["step-000001.ckpt", "step-000001.json"]


def test_best_is_not_resumed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "best-000009", {"step": 9}, {})
    assert checkpoint.load_newest(tmp_path) is None


# ---- hostile files


@pytest.mark.parametrize("form", ["zip", "legacy", "text", "empty"])
def test_a_checkpoint_with_code_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "checkpoints"
    save(folder, 1)

    def write(file: IO[bytes]) -> object:
        if form == "zip":
            return torch.save({"method": Bomb(marker)}, file)
        data = {"legacy": pickle.dumps(Bomb(marker), 2), "text": b"hello", "empty": b""}[form]
        return file.write(data)

    sha256, size = files.write_atomic(folder / "step-000002.ckpt", write)
    files.write_text(folder / "step-000002.json", json.dumps({"sha256": sha256, "bytes": size}))
    message, code = refused(lambda: checkpoint.load_newest(folder))
    assert code == Exit.UNTRUSTED and "step-000002.ckpt - holds more than tensors" in message
    assert not marker.exists()


@pytest.mark.parametrize("form", ["pickle", "zip", "text", "empty", "huge header"])
def test_a_file_that_is_no_encoder_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    file, marker = tmp_path / "encoder.safetensors", tmp_path / "marker"
    if form == "zip":
        torch.save(Bomb(marker), file)
    else:
        data = {"pickle": pickle.dumps(Bomb(marker)), "huge header": b"\xff" * 8 + b"{}"}
        file.write_bytes(data.get(form, b"hello" if form == "text" else b""))
    for path in (file, tmp_path):
        message, code = refused(lambda path=path: clsa.load_encoder(path))
        assert code == Exit.UNTRUSTED and str(file) in message and not marker.exists()


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"clsa": "{"}, {"clsa": "[]"}, {"clsa": "3"}, {"clsa": "{}"}]
    + [{"clsa": json.dumps({"model": model})} for model in ("x", {"zz": 1}, SMALL)]
    + [{"clsa": json.dumps({"model": {"encoder": name}})} for name in ("nope", "hf-hub:a/b")],
)
def test_safetensors_of_another_program_are_refused(metadata: Any, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, file, metadata=metadata)
    message, code = refused(lambda: clsa.load_encoder(file))
    assert code == Exit.UNTRUSTED and "not an encoder of clsa" in message


def test_a_missing_encoder_is_missing_input(tmp_path: Path) -> None:
    message, code = refused(lambda: clsa.load_encoder(tmp_path))
    assert code == Exit.NO_INPUT and "finish the run first" in message
    assert refused(lambda: clsa.load_encoder(tmp_path / "no.safetensors"))[1] == Exit.NO_INPUT


# ---- encoder files


def test_encoder_round_trip_to_the_bit(tmp_path: Path) -> None:
    options = ModelOptions.parse(SMALL, "test")
    encoder = build_encoder(options, seed=3)
    encoder(torch.randn(4, 3, 16, 16))  # moves the running statistics
    file = tmp_path / "encoder.safetensors"
    facts = saved_encoder.EncoderFacts(
        model=options, views=ViewOptions(), data=DataOptions(data="here"), recipe="clsa-small",
        seed=3, step=12, data_digest="d",
    )  # fmt: skip
    saved_encoder.save_encoder(file, encoder, facts)
    loaded, read = saved_encoder.load_encoder_facts(file)
    assert read == facts and not loaded.training
    assert digests.digest(loaded.state_dict()) == digests.digest(encoder.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(clsa.load_encoder(tmp_path)(images), encoder.eval()(images))
    before = file.read_bytes()
    saved_encoder.save_encoder(file, loaded, facts)
    assert file.read_bytes() == before


# ---- digest


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """A real state after a step, so that the optimiser has its momentum."""
    options = resolve({"model": SMALL, "method": {"queue_size": 6}})
    method = build_method(options, Extent(12, 0, 2, 4))
    optimizer = build_optimizer(method, options.optim)
    for param in method.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}


def leaves(state: Any) -> Iterator[tuple[Any, Any]]:
    for key in state if isinstance(state, dict) else range(len(state)):
        if isinstance(state[key], (dict, list)):
            yield from leaves(state[key])
        else:
            yield state, key


def other(value: Any) -> Any:
    """A value that differs from `value` as little as possible."""
    if isinstance(value, Tensor):
        changed = value.clone(memory_format=torch.contiguous_format)
        raw = changed.view(-1).view(torch.uint8)
        raw[len(raw) // 2] ^= 1
        return changed
    return {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 1e-9}.get(
        type(value), lambda v: f"{v}?"
    )(value)


def test_digest_changes_with_every_leaf(state: dict[str, Any]) -> None:
    reference = digests.digest(state)
    changed = copy.deepcopy(state)
    assert digests.digest(changed) == reference
    seen = {reference}
    for holder, key in leaves(changed):
        value = holder[key]
        holder[key] = other(value)
        seen.add(digests.digest(changed))
        holder[key] = value
    assert len(seen) == 1 + sum(1 for _ in leaves(changed)) > 100
    assert digests.digest(changed) == reference


def test_digest_sees_kind_shape_and_name_but_not_order_or_layout() -> None:
    rows = torch.arange(6.0)
    a = digests.digest({"a": rows, "b": 1})
    assert a == digests.digest({"b": 1, "a": rows.clone()})
    for changed in (
        {"a": rows.view(2, 3), "b": 1},
        {"a": rows.view(torch.int32), "b": 1},
        {"a": rows.double(), "b": 1},
        {"c": rows, "b": 1},
        {"a": rows, "b": 1.0},
        {"a": rows, "b": True},
        {"a": rows, "b": "1"},
        {"a": rows},
    ):
        assert digests.digest(changed) != a
    image = torch.randn(2, 3, 4, 4)
    last = image.to(memory_format=torch.channels_last)
    assert digests.digest([image]) == digests.digest([last])
    assert digests.digest(torch.tensor(1)) != digests.digest(torch.tensor(2))
    assert digests.digest(torch.tensor(-0.0)) != digests.digest(torch.tensor(0.0))


def test_digest_survives_the_disk(state: dict[str, Any], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoints", checkpoint.name_of(checkpoint.STEP, 1), state, {})
    assert checkpoint.run_digest(tmp_path) == digests.digest(state)


def test_digest_of_a_run_leaves_out_what_is_only_reported(tmp_path: Path) -> None:
    found = set()
    for best in (1.0, 2.0):
        state = {"method": {}, "optimizer": {}, "step": 1, "best": best, "data_digest": "x"}
        checkpoint.save(tmp_path / "checkpoints", checkpoint.name_of(checkpoint.STEP, 1), state, {})
        found.add(checkpoint.run_digest(tmp_path))
    assert len(found) == 1
    message, code = refused(lambda: checkpoint.run_digest(tmp_path / "nothing"))
    assert code == Exit.NO_INPUT and "holds no checkpoint" in message


# ---- files


def failing(error: Exception) -> Callable[[IO[bytes]], object]:
    def write(file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise error

    return write


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, Exit.IO),
        (errno.EDQUOT, Exit.IO),
        (errno.EIO, Exit.IO),
        (errno.EROFS, Exit.CANNOT_WRITE),
        (errno.EACCES, Exit.CANNOT_WRITE),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    number: int, code: Exit, tmp_path: Path
) -> None:
    path = tmp_path / "a.bin"
    files.write_text(path, "old")
    write = failing(OSError(number, os.strerror(number)))
    message, given = refused(lambda: files.write_atomic(path, write))
    assert given == code and str(path) in message and os.strerror(number) in message
    assert path.read_text() == "old" and names(tmp_path) == ["a.bin"]


def test_a_bug_in_the_writer_stays_a_bug(tmp_path: Path) -> None:
    for error in (RuntimeError("mine"), ZeroDivisionError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            files.write_atomic(tmp_path / "a", failing(error))  # pyright: ignore
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ClsaError("a worker", "killed", "again", Exit.IO)]
)
def test_an_exception_of_a_signal_handler_passes_through_a_save(
    error: BaseException, tmp_path: Path
) -> None:
    """After the handler's exception torch.save closes its file, which fails and hides it."""

    def write(file: Any) -> None:
        class Stream:
            written = 0

            def write(self, data: bytes) -> int:
                Stream.written += 1
                if Stream.written == 4:
                    raise error
                return file.write(data)

            def flush(self) -> None:
                file.flush()

        torch.save({"a": torch.zeros(1000), "b": torch.zeros(1000)}, Stream())  # pyright: ignore

    with pytest.raises(type(error)):
        files.write_atomic(tmp_path / "a", write)
    assert names(tmp_path) == []


@pytest.fixture
def small_disk() -> Iterator[int]:
    """No file may grow beyond this many bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_under_torch_save_keeps_the_last_checkpoint(
    tmp_path: Path, small_disk: int
) -> None:
    save(tmp_path, 1)
    state = {"rows": torch.zeros(small_disk)}
    message, code = refused(lambda: checkpoint.save(tmp_path, "step-000002", state, {}))
    assert code == Exit.IO and "File too large" in message and "free some space" in message
    assert names(tmp_path) == ["step-000001.ckpt", "step-000001.json"]
    saved = checkpoint.load_newest(tmp_path)
    assert saved and saved.state["step"] == 1


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for action in (
        lambda: files.write_text(tmp_path / "file" / "a", "x"),
        lambda: files.write_text(tmp_path / "missing" / "a", "x"),
        lambda: checkpoint.save(tmp_path / "file", "step-000001", {}, {}),
    ):
        assert refused(action)[1] == Exit.CANNOT_WRITE
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path) == ["file"]


def test_the_leftover_of_a_killed_process_with_our_pid_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".a.tmp-{os.getpid()}").write_text("half")
    files.write_text(tmp_path / "a", "whole")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "whole"


def test_only_the_files_of_dead_processes_are_cleared(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [f".a.tmp-{gone.pid}", f".step-000001.ckpt.tmp-{os.getpid()}"]
    others = [f".a.tmp-{os.getppid()}", ".a.tmp-", ".tmp-1x", f"a.tmp-{gone.pid}"]
    for name in (*left, *others):
        (tmp_path / name).write_text("half")
    files.remove_leftovers(tmp_path)
    files.remove_leftovers(tmp_path / "missing")
    assert names(tmp_path) == sorted(others)


def test_room_is_reserved_and_freed(tmp_path: Path, small_disk: int) -> None:
    files.require_room(tmp_path, small_disk)
    message, code = refused(lambda: files.require_room(tmp_path, small_disk + 1))
    assert code == Exit.CANNOT_WRITE and "File too large (0.1 MB needed)" in message
    assert names(tmp_path) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_mode_follows_umask(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "a", "x")
        save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_write_atomic_returns_hash_and_length(tmp_path: Path) -> None:
    got = files.write_atomic(tmp_path / "a", lambda file: [file.write(b"ab"), file.write(b"c")])
    assert got == ("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 3)
    files.write_text(tmp_path / "name", "a\udcffb")
    assert (tmp_path / "name").read_bytes() == b"a\xffb"


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "a", []
    files.write_text(path, "old")

    def write(file: IO[bytes]) -> None:
        file.write(b"ne")
        file.flush()
        seen.append(path.read_text())
        file.write(b"w")

    files.write_atomic(path, write)
    assert seen == ["old"] and path.read_text() == "new"
