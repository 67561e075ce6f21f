"""The loader yields each sample once an epoch, and goes on exactly where it was saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from zeropipe.errors import CheckpointError, UsageError
from zeropipe.runtime.dataloader import build_dataloader
from zeropipe.utils import RepeatingLoader


class Numbers(Dataset):
    def __init__(self, n):
        self.n = n
        self.loaded = []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.loaded.append(i)
        return torch.tensor(i)


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


def epoch(loader):
    return [batch.tolist() for batch in loader]


def take(loader, count):
    iterator = iter(loader)
    return [next(iterator).tolist() for _ in range(count)]


def test_ranks_share_an_epoch_and_epochs_differ():
    loaders = [build_dataloader(Numbers(12), 2, rank, 3, seed=7) for rank in range(3)]
    first = [epoch(loader) for loader in loaders]
    assert sorted(i for batches in first for b in batches for i in b) == list(range(12))
    assert all(len(batches) == len(loader) == 2 for batches, loader in zip(first, loaders, strict=True))
    second = [epoch(loader) for loader in loaders]
    assert first != second and all(loader.epoch == 2 for loader in loaders)
    loaders[0].set_epoch(0)
    assert epoch(loaders[0]) == first[0]


def test_not_shuffled_is_in_order():
    assert epoch(build_dataloader(Numbers(5), 2, shuffle=False)) == [[0, 1], [2, 3], [4]]
    assert epoch(build_dataloader(Numbers(5), 2, shuffle=False, drop_last=True)) == [[0, 1], [2, 3]]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(0, 12), st.booleans()
)
def test_resume_anywhere_yields_exactly_the_rest(n, batch, size, drop_last, stop, stream):
    def fresh():
        data = Stream(n) if stream else Numbers(n)
        return build_dataloader(data, batch, size - 1, size, drop_last=drop_last, seed=3)

    straight = fresh()
    two_epochs = epoch(straight) + epoch(straight)
    if not two_epochs:
        return
    stop %= len(two_epochs)
    saved = fresh()
    seen = []
    iterator = iter(saved)
    while len(seen) < stop:
        try:
            seen.append(next(iterator).tolist())
        except StopIteration:
            iterator = iter(saved)
    resumed = fresh()
    resumed.load_state_dict(saved.state_dict())
    rest = []
    while resumed.epoch < 2:
        rest += epoch(resumed)
    assert seen + rest == two_epochs


def test_resume_does_not_load_what_was_consumed():
    saved = build_dataloader(Numbers(100), 4)
    take(saved, 20)
    data = Numbers(100)
    resumed = build_dataloader(data, 4)
    resumed.load_state_dict(saved.state_dict())
    assert len(epoch(resumed)) == 5
    assert len(data.loaded) == 20


def test_resume_on_fewer_ranks_repeats_nothing():
    old = [build_dataloader(Numbers(24), 2, rank, 4, seed=1) for rank in range(4)]
    seen = {i for loader in old for b in take(loader, 1) for i in b}
    new = [build_dataloader(Numbers(24), 2, rank, 2, seed=1) for rank in range(2)]
    for loader in new:
        loader.load_state_dict(old[0].state_dict())
    rest = [i for loader in new for b in epoch(loader) for i in b]
    assert len(seen) == 8 and sorted(seen.union(rest)) == list(range(24)) and len(rest) == 16


def test_breaking_off_starts_the_epoch_over():
    loader = build_dataloader(Numbers(8), 2)
    assert take(loader, 2) == take(loader, 2)
    assert loader.epoch == 0


def test_a_counted_loop_advances_the_epoch_too():
    loader = build_dataloader(Numbers(8), 2)
    first = take(loader, 4)  # never asks for the fifth
    assert loader.state_dict()["epoch"] == 1
    assert epoch(loader) != first


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(build_dataloader(Numbers(8), 2))
    epoch(build_dataloader(Stream(8), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_give_the_same_batches():
    assert epoch(build_dataloader(Numbers(9), 2, num_workers=1)) == epoch(build_dataloader(Numbers(9), 2))


def test_a_foreign_state_is_refused():
    state = build_dataloader(Numbers(4), 1).state_dict()
    with pytest.raises(CheckpointError, match="expected keys epoch, batches"):
        build_dataloader(Stream(4), 1).load_state_dict(state)
    with pytest.raises(UsageError, match="at least 1"):
        build_dataloader(Numbers(4), 0)


def test_repeating_loader():
    loader = RepeatingLoader(build_dataloader(Numbers(3), 2, shuffle=False))
    assert [next(loader).tolist() for _ in range(5)] == [[0, 1], [2], [0, 1], [2], [0, 1]]
    assert len(loader) == 2 and loader.state_dict()["epoch"] == 2
    resumed = RepeatingLoader(build_dataloader(Numbers(3), 2, shuffle=False))
    resumed.load_state_dict(loader.state_dict())
    assert next(resumed).tolist() == [2]
    with pytest.raises(UsageError, match="gives no micro-batch"):
        next(iter(RepeatingLoader([])))
