import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clsa.evaluate.features.leaks import find_leaks, remembered, thumbnails
from clsa.pictures.named_sets import NAMED
from clsa.pictures.sources import Pictures


@pytest.fixture(scope="module")
def val() -> Pictures:
    return Pictures(*NAMED["clipart"]("", "val"))


def changed(image: np.ndarray, kind: str) -> np.ndarray:
    """A copy as found in practice: compressed, halved and enlarged again, or with other light."""
    picture = Image.fromarray(image)
    if kind == "jpeg":
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=50)
        picture = Image.open(stream)
    elif kind == "half":
        picture = picture.resize((32, 32), Image.Resampling.BILINEAR).resize((64, 64))
    elif kind == "light":
        picture = picture.point(lambda value: int(value * 0.8 + 10))
    return np.asarray(picture.convert("RGB"))


def of(images: np.ndarray) -> Pictures:
    return Pictures(images, np.full(len(images), -1, np.int64), [])


@pytest.mark.parametrize("kind", ["jpeg", "half", "light"])
def test_copies_are_found(val: Pictures, kind: str) -> None:
    judged = np.stack([changed(image, kind) for image in val.images[:200]])
    found = find_leaks(thumbnails(val), thumbnails(of(judged)))
    assert found.count == 200
    assert (found.twins == np.arange(200)).mean() > 0.98  # some drawings are alike


def test_other_pictures_are_not_found(val: Pictures) -> None:
    """The embedded set was split so that near duplicates are in the same split."""
    train = Pictures(*NAMED["clipart"]("", "train"))
    found = find_leaks(thumbnails(train), thumbnails(val))
    assert found.count == 0


def test_exact_copies_are_counted_apart_and_plain_pictures_never_match() -> None:
    drawn = np.random.default_rng(0)
    images = drawn.integers(0, 256, (6, 20, 20, 3)).astype(np.uint8)
    images[4] = 255  # blank paper
    images[5] = 250
    judged = images[[3, 1, 5]].copy()
    judged[1] = np.clip(judged[1].astype(int) + 2, 0, 255)
    judged[2] = 245
    found = find_leaks(thumbnails(of(images)), thumbnails(of(judged)))
    assert found.exact.tolist() == [True, False, False]
    assert found.near.tolist() == [False, True, False] and found.twins[:2].tolist() == [3, 1]


def test_plain_colours_and_tints_are_no_duplicates() -> None:
    """Only what is left without the mean of each colour is compared."""
    plain = np.zeros((4, 20, 20, 3), np.uint8)
    plain[:] = np.array([[200, 30, 30], [180, 50, 40], [30, 200, 30], [210, 25, 35]])[:, None, None]
    found = find_leaks(thumbnails(of(plain[:2])), thumbnails(of(plain[2:])))
    assert found.count == 0
    drawn = np.random.default_rng(0)
    tint = np.array([150, 20, 40])
    noise = np.clip(tint + drawn.normal(0, 25, (12, 20, 20, 3)), 0, 255).astype(np.uint8)
    assert find_leaks(thumbnails(of(noise[:6])), thumbnails(of(noise[6:]))).count == 0
    again = np.clip(noise[:6].astype(int) + 5, 0, 255).astype(np.uint8)
    assert find_leaks(thumbnails(of(noise[:6])), thumbnails(of(again))).count == 6


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, val: Pictures) -> None:
    from clsa.evaluate.features import leaks

    bank = thumbnails(val)
    queries = bank[torch.arange(0, 600, 7)]
    whole = find_leaks(bank, queries)
    monkeypatch.setattr(leaks, "CHUNK", 16)
    parts = find_leaks(bank, queries)
    assert np.array_equal(whole.near, parts.near) and np.array_equal(whole.twins, parts.twins)


def test_thumbnails_are_remembered_for_the_same_pictures_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val: Pictures
) -> None:
    from clsa.evaluate.features import leaks

    path = tmp_path / "thumbnails.npy"
    few = val.subset(np.arange(20))
    first = remembered(few, path)
    assert torch.equal(first, thumbnails(few))
    monkeypatch.setattr(leaks, "thumbnails", lambda _: pytest.fail("made again"))
    assert torch.equal(remembered(few, path), first)
    monkeypatch.undo()
    other = val.subset(np.arange(30))
    assert len(remembered(other, path)) == 30
    path.write_bytes(b"torn")
    assert torch.equal(remembered(few, path), first)


def test_the_warning_names_pairs(val: Pictures, caplog: pytest.LogCaptureFixture) -> None:
    from clsa.evaluate.features.leaks import warn_of_leaks

    bank, judged = val.subset(np.arange(20)), val.subset(np.arange(3, 8))
    found = find_leaks(thumbnails(bank), thumbnails(judged))
    with caplog.at_level(logging.WARNING, "clsa"):
        warn_of_leaks(found, judged, bank)
    assert "5 of 5 evaluation pictures were pretrained on (5 exact" in caplog.text
    assert f"{val.ids[3]} = {val.ids[3]}" in caplog.text
