"""Shapes are checked while tests run: one function of each wing refuses a wrong one."""

from collections.abc import Callable

import jaxtyping
import numpy as np
import pytest
import torch

from clsa.evaluate.classify.knn import knn_predict
from clsa.learning.losses import info_nce
from clsa.loading.few_labels import Stratified
from clsa.methods.method import sum_of
from clsa.pictures.decode import Picture
from clsa.system.signals import Stop
from clsa.training.step import agree
from clsa.views.geometry import centre_boxes

ROWS, ONE = torch.eye(4), torch.tensor(1.0)
LABELS = torch.arange(4)
WRONG: dict[str, Callable[[], object]] = {
    "pictures": lambda: Picture.of(np.zeros((4, 4), np.uint8)),  # no channels
    "views": lambda: centre_boxes(np.arange(3) + 9, np.arange(4) + 9, 1.0),  # 3 heights, 4 widths
    "loading": lambda: Stratified(np.zeros((2, 2), np.int64), 1, 1, 0),  # labels in two dimensions
    "learning": lambda: info_nce(ROWS, torch.eye(5), LABELS, 0.2),  # other dimensions
    "methods": lambda: sum_of([ROWS]),  # no scalar
    "evaluate": lambda: knn_predict(ROWS, ROWS, LABELS[:3], 4, 1),  # a label too few
    "training": lambda: agree(ONE, ROWS, Stop()),  # no scalar
}


@pytest.mark.parametrize("wing", WRONG)
def test_a_wrong_shape_is_refused(wing: str) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        WRONG[wing]()
