"""Write features of pictures to a table: a Parquet file that any data tool can read."""

import io
import json
import logging
from pathlib import Path
from typing import IO, Any

import numpy as np

from clsa.evaluate.features.extract import centre_views, encode, frozen
from clsa.learning.models import feature_dim
from clsa.options.commands import EmbedOptions
from clsa.pictures import opening
from clsa.pictures.folders import tell
from clsa.pictures.names import as_text
from clsa.runs import digests, saved_encoder
from clsa.runs.saved_encoder import data_of
from clsa.system import dist, files
from clsa.system.machine import keep_freed_memory


def embed(options: EmbedOptions) -> Path:
    """Write path, label and vector of every readable picture of a split to `options.out`.

    Columns: `path` (string), `label` (string, null if unknown), `vector` (fixed-size list of
    float32: features of the centre crop, not normalised). The file's metadata has a JSON object
    under `clsa`: digests of encoder and data, and the number of unreadable pictures, which are left
    out. Paths are relative to the folder of the source; bytes that are not UTF-8 are written as
    `\\xNN`.

    Returns:
        The path of the table. It appears only when it is complete; missing folders are created.
    """
    import pyarrow as pa  # slow to import, needed nowhere else
    import pyarrow.parquet as pq

    encoder, facts = saved_encoder.load_encoder_facts(options.run)
    device = dist.pick_device(options.device)
    keep_freed_memory()
    encoder = encoder.to(device)
    views, data = facts.views, data_of(options.data, facts)
    spec = data.val if options.split == "val" and data.val else data.data
    source = opening.open_source(spec, options.split, data)
    tell(source, "pictures")
    names = np.array([*source.classes, None], dtype=object)  # the last one is for label -1
    width = feature_dim(encoder)
    vector = pa.list_(pa.float32(), width)
    schema = pa.schema({"path": pa.string(), "label": pa.string(), "vector": vector})

    def write(file: IO[bytes]) -> None:
        written = 0
        with pq.ParquetWriter(_Sink(file), schema) as writer:
            for rows, images in centre_views(source, np.arange(len(source)), views, device):
                features = encode(encoder, images, options.batch_size).cpu().numpy()
                columns = [
                    pa.array([as_text(source.ids[i]) for i in rows], pa.string()),
                    pa.array(names[source.labels[rows]], pa.string()),
                    pa.FixedSizeListArray.from_arrays(features.reshape(-1), width),
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                written += len(rows)
            unreadable = len(source) - written
            about = {
                "encoder_digest": digests.digest(encoder.state_dict()),
                "data_digest": source.digest(),
                "unreadable": unreadable,
            }
            writer.add_key_value_metadata({"clsa": json.dumps(about)})
        if unreadable:
            logging.getLogger("clsa").warning("%d pictures cannot be read", unreadable)

    with files.output_errors(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
    with frozen(encoder):
        files.write_atomic(options.out, write)
    return options.out


class _Sink(io.RawIOBase):
    """A file object as pyarrow needs it, around a file that can only be written to."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)
