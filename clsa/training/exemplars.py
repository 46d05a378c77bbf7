"""Choose which pictures of a stage are kept for later stages (CCSSL)."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from clsa.evaluate.features.extract import centre_views, drawn_views, encode, frozen
from clsa.learning.clustering import LEAST, k_means
from clsa.learning.models import Network
from clsa.loading.loader import EVAL_CHUNK
from clsa.options.run import RunOptions
from clsa.pictures.sources import Source
from clsa.views.specs import weak_specs

NUM_VIEWS, FIRST_VIEW = 6, 2000


def choose_exemplars(
    network: Network, source: Source, options: RunOptions, num_clusters: int, device: torch.device
) -> Int64[np.ndarray, " m"]:
    """Choose from each cluster of a stage the pictures whose views differ least for the network.

    The clusters come from k-means over unit projections of centre crops. Each cluster gives its
    `continual.exemplars` pictures with the least spread sum_v |f_v - norm(mean_v f_v)|^2, over the
    centre crop and six weak views. The number of clusters is reduced if they would hold fewer than
    ten pictures each. Pictures that cannot be read are never chosen.

    Returns:
        Their numbers in the source, in order.
    """
    everything = np.arange(len(source))
    views = torch.zeros(1 + NUM_VIEWS, len(source), network.dim)
    weak = weak_specs(options.views)[0]
    with frozen(network):
        streams = [centre_views(source, everything, options.views, device)] + [
            drawn_views(
                source, everything, weak._replace(view=FIRST_VIEW + v), options.seed, device
            )
            for v in range(NUM_VIEWS)
        ]
        for place, stream in enumerate(streams):
            for numbers, images in stream:
                views[place, torch.from_numpy(numbers)] = encode(network, images, EVAL_CHUNK).cpu()
    read = np.flatnonzero(views[0].any(1).numpy())
    least = spread(views[:, torch.from_numpy(read)])
    clusters = max(1, min(num_clusters, len(read) // LEAST))
    assignment = np.zeros(len(read), np.int64)
    if clusters > 1:
        assignment = k_means(views[0].numpy()[read], clusters, options.seed % (1 << 31)).assignment
    chosen = chosen_of(least.numpy(), assignment, options.continual.exemplars)
    return read[chosen]


def spread(views: Float[Tensor, "V n D"]) -> Float[Tensor, " n"]:
    """sum_v |f_v - norm(mean_v f_v)|^2 of each picture: 0 if all its views are equal."""
    centre = F.normalize(views.mean(0), dim=1)
    return (views - centre).square().sum((0, 2))


def chosen_of(
    spreads: Float[np.ndarray, " n"], assignment: Int64[np.ndarray, " n"], count: int
) -> Int64[np.ndarray, " m"]:
    """The `count` rows with the least spread in each cluster, sorted by row number."""
    chosen = []
    for cluster in np.unique(assignment):
        rows = np.flatnonzero(assignment == cluster)
        chosen.append(rows[np.argsort(spreads[rows], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))
