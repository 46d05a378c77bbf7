"""CLIM's loss against its equation, which views are mixed and queued, embeddings on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clsa.evaluate.features import projections
from clsa.evaluate.features.projections import Projections
from clsa.learning.losses import info_nce
from clsa.learning.models import Network, encode_shuffled
from clsa.methods import build_method
from clsa.methods.wrappers.clim import CLIM
from clsa.options.config import merge
from clsa.options.run import DataOptions, ModelOptions, ViewOptions
from clsa.pictures.opening import open_source
from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.views import rng
from clsa.views.mixing import draw, mix
from tests.support.contract import EXTENT, batch_of, build, embed, tiny
from tests.support.pictures import clipart_folder

CPU = torch.device("cpu")
BASES = ["moco-v2", "moco-v1", "infomin", "adco", "pcl", "clsa"]


def clim(recipe: str, **over: Any) -> CLIM:
    """CLIM around a recipe's method, after its first refresh, batch norm frozen."""
    method = build(recipe, **merge({"clim": True, "stronger": False}, over)).eval()
    assert isinstance(method, CLIM)
    return method


def slow_contrast(method: CLIM, batch: Any) -> Tensor:
    """L of CLIM's docstring, each term by the public loss over its whole bank."""
    count, base, options = method.count, method.base, method.options
    size = max(spec.size for spec in method.view_specs)
    mixture = draw(options, size, method.seed, batch.step, batch.index[:count])
    groups: dict[int, dict[str, Tensor]] = {}
    for spec, view in zip(method.view_specs, batch.views, strict=True):
        groups.setdefault(spec.size, {})[spec.name.split()[0]] = view
    network: Any = base.key_network
    anchors = batch.part(0, count)
    anchors = anchors._replace(views=anchors.views[: len(base.view_specs)])
    bank = base(anchors).comparisons[0].bank
    total, rest = torch.zeros(()), bank[count:]
    settings: Any = base.options
    own_only = getattr(settings, "bank", "queue") == "queue" and not hasattr(base, "negatives")
    candidates = torch.eye(count, dtype=torch.bool) if own_only else None
    share = 1 / len(groups) ** 2 if options.reduce == "mean" else 1.0
    for queries in groups.values():
        for name, view in queries.items():
            if name == "key":
                continue
            mixed = view[:count]
            if options.mixing != "none":
                mixed = mix(view[:count], view[count:], mixture)
            query = method.network(mixed)
            for keys in groups.values():
                for rows, lam in (
                    (keys["key"][:count], mixture.share),
                    (keys["key"][count:], 1 - mixture.share),
                ):
                    with torch.no_grad():
                        whole = torch.cat([network(rows), rest])
                    terms = [
                        info_nce(
                            query[i : i + 1], whole, torch.tensor([i]), settings.temperature,
                            None if candidates is None else candidates[i : i + 1],
                        )
                        for i in range(count)
                    ]  # fmt: skip
                    total = total + share * (lam * torch.stack(terms)).mean()
    return total


@pytest.mark.parametrize("mixing", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_contrast_equals_the_equation(mixing: str, reduce: str) -> None:
    method = clim("clim-multi-res", mixture={"mixing": mixing, "reduce": reduce})
    batch = batch_of(method, 1)
    assert [view.shape[-1] for view in batch.views] == [16, 16, 12, 12]
    found = method(batch).losses["contrast"]
    torch.testing.assert_close(found, slow_contrast(method, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", BASES)
def test_it_goes_around_every_method_with_keys(recipe: str) -> None:
    method = clim(recipe)
    batch = batch_of(method, 1)
    output = method(batch)
    torch.testing.assert_close(
        output.losses["contrast"], slow_contrast(method, batch), rtol=1e-4, atol=1e-5
    )
    assert ("prototypes" in output.losses) == (recipe == "pcl")
    queries, bank, positive, _ = output.comparisons[0]
    keys = encode_shuffled(method.base.key_network, batch.views[0][:8], 0, 1)  # pyright: ignore
    others = encode_shuffled(method.base.key_network, batch.views[0][8:], 0, 1)  # pyright: ignore
    torch.testing.assert_close(bank[:8], keys)
    torch.testing.assert_close(bank[8:16], others)
    assert len(queries[0]) == 8 and positive is not None and positive.tolist() == list(range(8))


def test_local_queries_are_mixed_too_and_have_one_size() -> None:
    method = clim("clim-multi-crop", mixture={"resolutions": (12,)})
    sizes = [(spec.name, spec.size) for spec in method.view_specs]
    assert sizes == [("key", 16), ("weak0", 16), ("local0", 16), ("local1", 16),
                     ("key 12", 12), ("weak0 12", 12)]  # fmt: skip
    assert method.weights == [0.25, 0.5, 0.5, 0.25]
    assert method.landmarks.chance == pytest.approx(3 * np.log(13))
    method(batch_of(method)).losses["contrast"].backward()


def test_refreshes_come_every_so_many_epochs_from_the_start_on() -> None:
    method = build_method(tiny("clim", mixture={"start": 0.26, "refresh_epochs": 1}), EXTENT)
    assert [method.refreshes(epoch) for epoch in range(4)] == [False, False, True, True]
    method = build_method(tiny("clim", mixture={"start": 1.0}), EXTENT)
    assert not any(method.refreshes(epoch) for epoch in range(4))


def test_the_key_network_is_embedded_once_even_around_pcl() -> None:
    method, seen = build_method(tiny("pcl", clim=True), EXTENT), []
    assert isinstance(method, CLIM)

    def watched(network: Network) -> Tensor:
        seen.append(network)
        return embed(network)

    found = method.before_epoch(0, watched)
    assert seen == [method.base.key_network]
    assert {"positives", "embedding_s", "clustering_s", "search_s", "largest_cluster"} == set(found)


def test_only_the_pictures_own_keys_at_full_size_are_queued() -> None:
    method = clim("clim-multi-res")
    batch = batch_of(method)
    output = method(batch)
    (keys,) = output.state
    assert len(keys) == 8
    network: Any = method.base.key_network
    torch.testing.assert_close(keys, network(batch.views[0][:8]))
    method.after_step(output.state, 0)
    queue = method.get_submodule("base.queue").get_buffer("rows")
    assert torch.equal(queue[:8], keys)


def test_keys_are_of_unmixed_views_and_queries_of_mixed_ones() -> None:
    method = clim("clim")
    batch = batch_of(method)
    box = draw(method.options, 16, method.seed, 0, batch.index[:8]).box
    assert box is not None
    views = [view.clone().requires_grad_() for view in batch.views]
    method(batch._replace(views=views)).losses["contrast"].backward()
    assert views[0].grad is None  # the key network gives no gradient
    weak = views[1].grad
    assert weak is not None
    inside = mix(torch.zeros(8, 3, 16, 16), torch.ones(8, 3, 16, 16), method._mixture(batch)) > 0
    assert not weak[:8][inside].any() and not weak[8:][~inside].any()
    assert weak[:8][~inside].any() and weak[8:][inside].any()


def test_strong_views_are_mixed_with_the_same_boxes() -> None:
    method = build("clim", stronger=True).eval()
    batch = batch_of(method)
    inner: Any = method.get_submodule("base")
    strong = batch.views[-1]
    mixed = mix(strong[:8], strong[8:], inner._mixture(batch))
    torch.testing.assert_close(inner.query(strong, batch), method.network(mixed))
    output = method(batch)
    assert {"contrast", "divergence"} <= set(output.losses)
    (comparison,) = inner(batch._replace(views=batch.views[:-1])).comparisons
    assert len(comparison.bank) == 8 + 8 + 12
    assert comparison.candidates is not None
    assert torch.equal(comparison.candidates.int(), torch.eye(8).int().repeat(1, 2))


def test_a_resolution_that_the_encoder_does_not_take_is_refused() -> None:
    over = {"model": {"encoder": "vit6-w192"}, "mixture": {"resolutions": (13,)}}
    with pytest.raises(ClsaError, match="does not take views of 13 pixels"):
        build("moco-v2", clim=True, **over)


# ---- embeddings on the disk


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 drawings in three folders."""
    return clipart_folder(tmp_path_factory.mktemp("pictures"), classes=3, each=22)


VIEWS = ViewOptions(size=16)


@pytest.fixture
def network() -> Network:
    options = ModelOptions(encoder="resnet10-w32", projector_hidden=16, projector_dim=8)
    return Network(options, seed=0)


def test_an_interrupted_embedding_goes_on_to_the_same_bits(
    pictures: Path, tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "0broken.png").write_bytes(b"not a picture")
    source = open_source(str(pictures), "train", DataOptions())
    (pictures / "0broken.png").unlink()
    embed = Projections(source, VIEWS, CPU, tmp_path / "embeddings")
    plain = embed(network)
    assert plain.dtype == torch.float32 and not embed.folder.exists()
    monkeypatch.setattr(projections, "LIMIT", 100)
    monkeypatch.setattr(projections, "NOTED", 8)
    monkeypatch.setattr("clsa.loading.loader.EVAL_CHUNK", 8)
    whole = embed(network).clone()
    assert whole.dtype == torch.float16 and not whole[0].any()
    torch.testing.assert_close(whole.float(), plain, atol=2e-3, rtol=0)
    embed.clear()
    assert not embed.folder.exists()

    encode, calls = projections.encode, []

    def failing(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(projections, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        embed(network)
    (note,) = embed.folder.glob("*.json")
    assert json.loads(note.read_text())["rows"] == 33  # the unreadable one and four times eight
    assert torch.equal(embed(network), whole)
    assert len(calls) == 5 + -(-(len(source) - 33) // 8)
    other = Network(ModelOptions(encoder="resnet10-w32", projector_dim=8), seed=1)
    assert not torch.equal(embed(other), whole)  # another network starts again
    embed.clear()


def test_each_process_writes_its_share(
    pictures: Path, tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(pictures), "train", DataOptions())
    monkeypatch.setattr(projections, "LIMIT", 100)
    embed = Projections(source, VIEWS, CPU, tmp_path / "embeddings")
    whole = embed(network).clone()
    embed.clear()
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_max", lambda value: value)
    with pytest.raises(ClsaError, match="not all processes write to it"):
        embed(network)
    for rank in (1, 2, 3):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        if rank < 3:
            with pytest.raises(ClsaError, match="give all machines the same --out"):
                embed(network)
    torch.testing.assert_close(embed(network), whole, atol=1e-3, rtol=0)


def test_streams_of_draws_do_not_overlap() -> None:
    numbers = [value for name, value in vars(rng).items() if name.isupper() and name[0] != "_"]
    assert len(set(numbers)) == len(numbers)
