import pytest
import torch

from clsa.learning.bank import KeyQueue, keys_with_queue


@pytest.mark.parametrize("batch", [1, 3, 8, 10, 20, 37])
def test_queue_holds_the_last_keys_in_order_at_any_batch_size(batch: int) -> None:
    queue = KeyQueue(10, 2, seed=0)
    sent = torch.arange(5 * batch * 2, dtype=torch.float32).view(-1, 2)
    for keys in sent.split(batch):
        queue.enqueue(keys)
    pointer = int(queue.pointer)
    in_order = torch.cat([queue.rows[pointer:], queue.rows[:pointer]])
    kept = min(10, len(sent))
    assert torch.equal(in_order[-kept:], sent[-kept:])
    assert pointer == len(sent) % 10


def test_first_rows_are_unit_and_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = KeyQueue(50, 8, seed=3).rows
    torch.manual_seed(2)
    assert torch.equal(first, KeyQueue(50, 8, seed=3).rows)
    assert not torch.equal(first, KeyQueue(50, 8, seed=4).rows)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(50))


def test_bank_is_keys_then_queue_and_the_papers_bank_shows_the_own_key_only() -> None:
    queue, keys = KeyQueue(5, 2, seed=0), torch.eye(3, 2)
    bank, own, candidates = keys_with_queue(keys, queue, batch_negatives=True)
    assert torch.equal(bank, torch.cat([keys, queue.rows]))
    assert own.tolist() == [0, 1, 2] and candidates is None
    _, own, candidates = keys_with_queue(keys, queue, batch_negatives=False)
    assert candidates is not None and torch.equal(candidates, torch.eye(3, dtype=torch.bool))
