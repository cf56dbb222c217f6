"""HostPool against a model: random use, after each step of which blocks, accounts and pages must agree."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload import OutOfHostMemory, _native

PAGE = os.sysconf("SC_PAGE_SIZE")
BLOCK = 256
TAGS = ("weights", "master", "moments", "gradients", "activations", "staging")


def rounded(nbytes: int, step: int = BLOCK) -> int:
    return -(-max(nbytes, 1) // step) * step


def tensor_over(buffer: _native.HostBuffer) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8)


class PoolAgainstModel(RuleBasedStateMachine):
    """Random use of a small pool. Every block carries a stamp that must survive until the block is given back."""

    @initialize(budget_pages=st.integers(1, 40), slab_pages=st.integers(1, 8))
    def start(self, budget_pages: int, slab_pages: int) -> None:
        self.budget = budget_pages * PAGE
        self.pool = _native.HostPool(budget_bytes=self.budget, slab_bytes=slab_pages * PAGE, poison=True)
        self.live: list[tuple[_native.HostBuffer, int]] = []
        self.waiting: list[tuple[int, int, _native.Ticket]] = []  # address, bytes, ticket
        self.stamp = 0
        self.peaks = dict.fromkeys(TAGS, 0)

    @rule(nbytes=st.one_of(st.integers(0, 3 * PAGE), st.integers(0, 12 * PAGE)), tag=st.sampled_from(TAGS))
    def acquire(self, nbytes: int, tag: Any) -> None:
        before = self.pool.stats()
        more_pages = before["mapped_bytes"] + rounded(nbytes, PAGE) <= self.budget
        if self.waiting and not more_pages and before["used_bytes"] + rounded(nbytes) <= self.budget:
            return  # it might wait, and this thread is the one that ends the tickets
        try:
            buffer = self.pool.acquire(nbytes, tag)
        except OutOfHostMemory as error:
            after = self.pool.stats()
            assert {k: after[k] for k in before} == before
            assert tag in str(error)
            assert not more_pages
            return
        assert (buffer.nbytes, buffer.tag) == (nbytes, tag)
        assert buffer.address % BLOCK == 0
        if nbytes:
            assert bool((tensor_over(buffer) == 0xFF).all()), "a fresh or recycled block is poisoned"
            self.stamp = (self.stamp + 1) % 255
            tensor_over(buffer).fill_(self.stamp)
        self.live.append((buffer, self.stamp))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), with_ticket=st.booleans())
    def give_back(self, data: st.DataObject, with_ticket: bool) -> None:
        buffer, stamp = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        if buffer.nbytes:
            assert bool((tensor_over(buffer) == stamp).all())
        if with_ticket:
            ticket = _native.Ticket.pending()
            buffer.release_after(ticket)
            self.waiting.append((buffer.address, rounded(buffer.nbytes), ticket))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def end_ticket(self, data: st.DataObject) -> None:
        self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))[2].complete()

    @rule(nbytes=st.integers(0, 8 * PAGE))
    def reserve(self, nbytes: int) -> None:
        mapped = self.pool.stats()["mapped_bytes"]
        grown = mapped + (rounded(nbytes, PAGE) if nbytes else 0)
        try:
            self.pool.reserve(nbytes)
        except OutOfHostMemory:
            assert grown > self.budget
            assert self.pool.stats()["mapped_bytes"] == mapped
        else:
            # Over the budget there was room only because free slabs were given back.
            after = self.pool.stats()["mapped_bytes"]
            assert after == grown if grown <= self.budget else mapped > after - rounded(nbytes, PAGE)

    @rule()
    def trim(self) -> None:
        before = self.pool.stats()["mapped_bytes"]
        returned = self.pool.trim()
        assert self.pool.stats()["mapped_bytes"] == before - returned

    @invariant()
    def accounts_agree(self) -> None:
        stats = self.pool.stats()
        sizes = [buffer.nbytes for buffer, _ in self.live]
        assert stats["mapped_bytes"] <= self.budget
        assert stats["live_count"] == len(self.live)
        assert stats["requested_bytes"] == sum(sizes)
        assert stats["used_bytes"] == sum(map(rounded, sizes)) == sum(stats["tag_bytes"].values())
        assert stats["waiting_bytes"] == sum(nbytes for _, nbytes, _ in self.waiting)
        for tag in TAGS:
            assert stats["tag_bytes"][tag] == sum(rounded(b.nbytes) for b, _ in self.live if b.tag == tag)
            self.peaks[tag] = max(self.peaks[tag], stats["tag_bytes"][tag])
            assert stats["tag_peak_bytes"][tag] == self.peaks[tag]

    @invariant()
    def blocks_do_not_overlap(self) -> None:
        spans = [(buffer.address, rounded(buffer.nbytes)) for buffer, _ in self.live]
        spans += [(address, nbytes) for address, nbytes, _ in self.waiting]
        spans.sort()
        for (address, nbytes), (following, _) in itertools.pairwise(spans):
            assert address + nbytes <= following

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.live.clear()
        for _, _, ticket in self.waiting:
            ticket.complete()
        mapped = self.pool.stats()["mapped_bytes"]
        assert self.pool.trim() == mapped, "all blocks joined into whole slabs again"


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
