"""Alarms: each problem on hand-made rows, spikes against a slow count, the alarm texts."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsa.learning.bank import KeyQueue
from clsa.learning.models import Network
from clsa.methods import METHODS
from clsa.methods.method import Comparison, Landmarks, Method, Output
from clsa.methods.wrappers.wrapper import innermost
from clsa.runs.alarms import (
    BLANK,
    COLLAPSE,
    FROZEN_QUEUE,
    LEAK,
    LOW_RANK,
    NO_LAG,
    NO_LEARNING,
    SPIKE,
    WORDS,
)
from clsa.training.health import LEAST, LIMITS, LOOK_EVERY, Health, Spikes, share_first
from tests.support.contract import BASES, batch_of, build

AROUND = ["clim-multi-res", "clim-multi-crop", "suncet", "continual"]
ROWS, DIM, BANK = 32, 64, 300


class Fake(Method):
    """A method whose `forward` returns the output it is given."""

    landmarks = Landmarks("contrast", 8.0, 1.0)
    first_queued = 0
    has_positives = True

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.queue = KeyQueue(8, DIM, 0)

    def forward(self, output: Any) -> Output:
        return output

    def after_step(self, state: Any, step: int) -> None:
        pass


def unit(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)))


def output(rows: Tensor, loss: float = 5.0, is_first: bool = False) -> Output:
    """Output of a step; with `is_first` each positive is the nearest row, else a random row."""
    bank = unit(BANK, 1)
    positive = torch.arange(len(rows)) + 3
    if is_first:
        bank[positive] = rows
    return Output({"contrast": torch.tensor(loss)}, None, [Comparison([rows], bank, positive)], {})


def watched(outputs: list[Output], moves: bool = True, **over: Any) -> list[tuple[int, str]]:
    """Step and name of each alarm over `outputs`, one output per step."""
    method: Any = Fake()
    facts = {"steps_per_epoch": 1000, "warmup_steps": 0, "step": 0, "watches": True, **over}
    health, alarms = Health(method, **facts), []
    for step, each in enumerate(outputs, 1):
        method(each)
        if moves:
            method.queue.enqueue(unit(4, step))
        found = health.after(float(each.losses["contrast"]), 1.0, is_bad=False)
        alarms += [(step, alarm.name) for alarm in found]
    return alarms


HEALTHY = [output(unit(ROWS, 7))] * 200


def test_a_healthy_run_raises_no_alarm() -> None:
    assert watched(HEALTHY) == []


def test_equal_rows_are_a_collapse_reported_once() -> None:
    same = F.normalize(unit(1, 2) + 1e-3 * unit(ROWS, 3))
    alarms = watched([*HEALTHY[:40], *[output(same)] * 80])
    assert [each for each in alarms if each[1] == COLLAPSE] == [(80, COLLAPSE)]


def test_rows_along_one_direction_have_low_rank_and_are_no_collapse() -> None:
    ends = torch.tensor([1.0, -1.0]).repeat(ROWS // 2)[:, None] * unit(1, 2)
    assert watched([output(ends)] * 60) == [(40, LOW_RANK)]


def test_a_rank_that_falls_far_below_its_peak_is_reported() -> None:
    few = unit(ROWS, 4)
    few[:, 2:] = 0
    alarms = watched([*HEALTHY[:40], *[output(F.normalize(few))] * 60])
    assert alarms == [(80, LOW_RANK)]


@pytest.mark.parametrize(("loss", "is_reported"), [(8.0, True), (7.93, True), (7.9, False)])
def test_a_loss_at_chance_is_reported_after_five_looks(loss: float, is_reported: bool) -> None:
    alarms = watched([output(unit(ROWS, 7), loss)] * 120)
    assert alarms == ([(100, NO_LEARNING)] if is_reported else [])


def test_a_loss_at_chance_in_the_warmup_is_not_reported() -> None:
    alarms = watched([output(unit(ROWS, 7), 8.0)] * 300, warmup_steps=150)
    assert alarms == [(240, NO_LEARNING)]


def test_positives_found_at_once_are_reported_in_the_first_epoch_only() -> None:
    leaking = [output(unit(ROWS, 7), is_first=True)] * 100
    assert watched(leaking) == [(40, LEAK)]
    assert watched(leaking, steps_per_epoch=30) == []


def test_a_queue_that_stops_is_reported_and_one_that_waits_is_not() -> None:
    assert watched(HEALTHY[:200], moves=False) == [(120, FROZEN_QUEUE)]
    Fake.first_queued = 400
    try:
        assert watched(HEALTHY[:200], moves=False) == []
    finally:
        Fake.first_queued = 0


def test_one_batch_of_equal_rows_is_reported_at_the_next_look() -> None:
    same = output(unit(1, 2).repeat(ROWS, 1))
    assert watched([*HEALTHY[:43], same, *HEALTHY[:60]]) == [(60, BLANK)]


def test_few_rows_show_no_collapse() -> None:
    assert watched([output(unit(1, 2).repeat(4, 1))] * 80) == []


def test_only_the_process_that_watches_reports() -> None:
    same = output(unit(1, 2).repeat(ROWS, 1))
    assert watched([same] * 80, watches=False) == []


def test_a_skipped_step_shows_nothing_and_the_next_looks_go_on() -> None:
    method: Any = Fake()
    health = Health(method, 1000, 0, 0, watches=True)
    broken = output(torch.full((ROWS, DIM), torch.nan))
    for step in range(1, 3 * LOOK_EVERY + 1):
        is_bad = step in (LOOK_EVERY, LOOK_EVERY + 5)
        method(broken if is_bad else HEALTHY[0])
        method.queue.enqueue(unit(4, step))
        assert health.after(5.0, 1.0, is_bad) == []
    assert health.numbers["spread"] > LIMITS.spread


# ---- spikes


def test_a_spike_is_so_many_deviations_above_the_median() -> None:
    draws = np.random.default_rng(0).normal(6.0, 0.2, LEAST)
    median = np.median(draws)
    deviation = 1.4826 * np.median(np.abs(draws - median))
    for far, is_reported in ((7.9, False), (8.1, True), (-20.0, False)):
        spikes = Spikes("the loss", 0.02)
        assert [spikes.after(float(value)) for value in draws] == [None] * LEAST
        found = spikes.after(float(median + far * deviation))
        assert (found is not None) == is_reported
        assert found is None or (found.name == SPIKE and "8 deviations" in found.looks)


def test_a_norm_is_judged_by_its_logarithm() -> None:
    spikes = Spikes("the gradient's norm", 0.25, logarithmic=True)
    for value in [1.0, 1.1] * 60:
        assert spikes.after(value) is None
    assert spikes.after(7.0) is None and spikes.after(9.0) is not None


def test_a_spike_is_reported_once_not_at_each_of_its_steps() -> None:
    jump = [output(unit(ROWS, 7), 7.0)] * 10
    assert watched([*HEALTHY[:150], *jump]) == [(151, SPIKE)]


# ---- positives


def test_share_first_equals_a_slow_loop() -> None:
    queries, bank = unit(ROWS, 5), unit(2500, 6)  # more than two tiles
    positive = torch.randint(0, 2500, (ROWS,), generator=torch.Generator().manual_seed(0))
    bank[positive[:20]] = F.normalize(queries[:20] + 0.3 * unit(20, 8))
    candidates = torch.rand(ROWS, 1500, generator=torch.Generator().manual_seed(1)) > 0.5
    for shown in (None, candidates):
        count = 0
        for i, query in enumerate(queries):
            others = [
                float(query @ row)
                for j, row in enumerate(bank)
                if j != positive[i] and (shown is None or j >= 1500 or shown[i, j])
            ]
            count += float(query @ bank[positive[i]]) > max(others)
        found = share_first(Comparison([queries], bank, positive, shown))
        assert found.item() == pytest.approx(count / ROWS)
    assert 0 < count < ROWS


def test_of_equal_rows_none_is_first_and_few_rows_give_nan() -> None:
    same = unit(1, 2).repeat(ROWS, 1)
    assert share_first(Comparison([same], same[:1].repeat(BANK, 1), torch.arange(ROWS))) == 0
    few = Comparison([same], same, torch.arange(ROWS))
    assert share_first(few).isnan()
    assert share_first(Comparison([same], unit(BANK, 1))).isnan()


# ---- methods


@pytest.mark.parametrize("stronger", [False, True])
@pytest.mark.parametrize("recipe", [*(BASES[name] for name in METHODS), *AROUND])
def test_every_method_can_be_watched(recipe: str, stronger: bool) -> None:
    method = build(recipe, stronger=stronger)
    health = Health(method, 3, 0, LOOK_EVERY - 1, watches=True)
    method(batch_of(method))
    health.after(1.0, 1.0, is_bad=False)
    assert 0 < health.numbers["spread"] < 1.5 and health.numbers["rankme"] >= 1
    assert health.take_numbers()["rankme"] >= 1 and health.take_numbers() == {}  # logged once


def test_a_key_network_without_lag_is_reported() -> None:
    method: Any = build("moco-v2", stronger=True)
    batch, alarms = batch_of(method), []
    health = Health(method, 1000, 0, 0, watches=True)
    for step in range(2 * LOOK_EVERY):
        result = method(batch)
        network, keys = method.base.network, method.base.key_network
        assert isinstance(keys, Network)
        keys.load_state_dict(network.state_dict())
        method.base.queue.enqueue(result.state[0])
        alarms += [alarm.name for alarm in health.after(step * 0.0, 1.0, is_bad=False)]
    assert NO_LAG in alarms


def test_the_queue_of_a_wrapper_may_rest() -> None:
    """Exemplars, whose keys it holds, come in later stages only."""
    method: Any = build("continual")
    batch, alarms = batch_of(method), []
    health = Health(method, 1000, 0, 0, watches=True)
    queue = innermost(method).queue
    assert isinstance(queue, KeyQueue) and isinstance(method.extra, KeyQueue)
    for step in range(140):
        if (step + 1) % LOOK_EVERY == 0:
            method(batch)
        queue.enqueue(F.normalize(torch.randn(4, queue.rows.shape[1])))
        alarms += [alarm.name for alarm in health.after(1.0, 1.0, is_bad=False)]
    assert FROZEN_QUEUE not in alarms


def test_every_alarm_has_words_with_its_numbers() -> None:
    values = dict.fromkeys(
        ("spread", "least", "limit", "rank", "peak", "loss", "chance", "top1", "value",
         "deviations", "median"), 1.0,
    )  # fmt: skip
    for looks, cause, advice in WORDS.values():
        assert looks.format(**values, full=2, rows=3, steps=4, what="the loss") and cause and advice
