"""`clsa pack`."""

import shlex

from clsa.cli.command import parse
from clsa.options.commands import PackOptions


def pack(args: list[str]) -> None:
    """Pack pictures into tar shards that are quick to read, also with webdataset."""
    options = parse(pack, PackOptions, args)
    from clsa.pictures.pack import pack as run

    packed = run(options)
    state = "packed" if packed.fresh else "packed already:"
    size, plural = packed.num_bytes / 1e6, "s" if packed.shards > 1 else ""
    print(f"{state} {packed.pictures:,} pictures, {size:,.1f} MB in {packed.shards} shard{plural}")
    name = shlex.quote(str(options.out))
    if packed.left_out:
        print(f"left out as unreadable: {packed.left_out} (see {name}/quarantine.jsonl)")
    print(f"Next: clsa pretrain --data {name} --out runs/packed")
