import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clsa.evaluate.embed import embed
from clsa.evaluate.features.extract import extract
from clsa.learning import models
from clsa.options.commands import EmbedOptions
from clsa.options.run import DataOptions, ModelOptions, ViewOptions
from clsa.pictures.opening import open_source
from clsa.runs import digests, saved_encoder
from clsa.system.errors import ClsaError, Exit

MODEL = ModelOptions(encoder="resnet10-w32")
VIEWS = ViewOptions(size=32)


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    data = DataOptions(data=str(tmp_path / "pictures"))
    facts = saved_encoder.EncoderFacts(
        model=MODEL, views=VIEWS, data=data, recipe="clsa", seed=0, step=1, data_digest=""
    )
    path = tmp_path / "encoder.safetensors"
    saved_encoder.save_encoder(path, models.build_encoder(MODEL, seed=0), facts)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder, generator = tmp_path / "pictures", np.random.default_rng(0)
    for name in (b"cat/1.png", b"cat/b\xff.png", "dög/3.png".encode()):
        path = Path(os.fsdecode(name))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 50, 3)).astype(np.uint8)).save(
            folder / path
        )
    (folder / "cat" / "2.png").write_bytes(b"\x89PNG and no more")
    return folder


def test_table_holds_what_extract_gives(encoder_file: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.parquet"
    assert embed(EmbedOptions(run=encoder_file, out=out, batch_size=2, device="cpu")) == out
    table = pq.read_table(out)
    assert table.column_names == ["path", "label", "vector"]
    assert table["path"].to_pylist() == ["cat/1.png", "cat/b\\xff.png", "dög/3.png"]
    assert table["label"].to_pylist() == ["cat", "cat", "dög"]
    source = open_source(str(pictures), "train", DataOptions())
    encoder = saved_encoder.load_encoder(encoder_file)
    rows, features = extract(encoder, source, np.arange(4), VIEWS, torch.device("cpu"), 2)
    assert rows.tolist() == [0, 2, 3]
    vectors = table["vector"].combine_chunks()
    assert str(vectors.type) == f"fixed_size_list<element: float>[{features.shape[1]}]"
    assert torch.equal(torch.tensor(table["vector"].to_pylist()), features)
    about = json.loads(pq.read_metadata(out).metadata[b"clsa"])
    assert about == {
        "encoder_digest": digests.digest(encoder.state_dict()),
        "data_digest": source.digest(),
        "unreadable": 1,
    }


def test_unlabelled_pictures_have_null_labels(
    encoder_file: Path, pictures: Path, tmp_path: Path
) -> None:
    flat = DataOptions(data=str(pictures / "cat"))
    out = embed(EmbedOptions(run=encoder_file, data=flat, out=tmp_path / "t.parquet", device="cpu"))
    assert pq.read_table(out)["label"].to_pylist() == [None, None]


def test_val_split_is_the_given_one(encoder_file: Path, pictures: Path, tmp_path: Path) -> None:
    data = DataOptions(data=str(pictures), val=str(pictures / "cat"))
    options = EmbedOptions(
        run=encoder_file, data=data, split="val", out=tmp_path / "t.parquet", device="cpu"
    )
    assert len(pq.read_table(embed(options))) == 2


def test_missing_folders_are_made(encoder_file: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "er" / "t.parquet"
    assert len(pq.read_table(embed(EmbedOptions(run=encoder_file, out=out, device="cpu")))) == 3
    out = tmp_path / "cat" / "t.parquet"
    (tmp_path / "cat").write_text("a file")
    with pytest.raises(ClsaError) as caught:
        embed(EmbedOptions(run=encoder_file, out=out, device="cpu"))
    assert caught.value.code == Exit.CANNOT_WRITE and (tmp_path / "cat").read_text() == "a file"
