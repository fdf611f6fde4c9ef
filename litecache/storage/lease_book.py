"""Counting leases: which client holds which slot, how often.

Under the store's lock. A block's own count is the sum over all clients.
"""

from __future__ import annotations

from collections.abc import Iterable

from .leases import Client
from .ram_tier import RamBlock, RamState, RamTier


class LeaseBook:
    """Gives and ends leases.

    Args:
        ram: the slots.
    """

    def __init__(self, ram: RamTier) -> None:
        self._ram = ram
        self.own = Client(0, 0, -1)

    def give(self, client: Client, block: RamBlock) -> None:
        """One more lease."""
        held = client.leases.get(block.slot)
        if held is None:
            client.leases[block.slot] = [block.generation, 1]
        else:
            held[1] += 1
        block.leases += 1

    def end_many(self, client: Client, slots: Iterable[tuple[int, int]]) -> None:
        """One lease less on each slot; those that the client does not hold are ignored."""
        for slot, generation in slots:
            block = self.end(client, slot, generation)
            # most blocks just stay where they are
            if block is not None and (block.dead or block.state is RamState.RESERVED):
                self.abandon(block)

    def end(self, client: Client, slot: int, generation: int) -> RamBlock | None:
        """One lease less; the block, or None when the client holds no such lease."""
        held = client.leases.get(slot)
        if held is None or held[0] != generation:
            return None
        held[1] -= 1
        if not held[1]:
            del client.leases[slot]
        block = self._ram.by_slot[slot]
        block.leases -= 1
        return block

    def abandon(self, block: RamBlock) -> None:
        """After a lease ended: a slot that was never committed, or is dead, goes back."""
        if block.state is RamState.RESERVED and not block.dead and not block.leases:
            block.dead = True
        self._ram.reap(block)

    def end_all(self, client: Client) -> None:
        """The client is gone."""
        for slot, (_, count) in list(client.leases.items()):
            block = self._ram.by_slot[slot]
            block.leases -= count
            self.abandon(block)
        client.leases.clear()

    def check_integrity(self, clients: Iterable[Client]) -> None:
        """AssertionError unless clients and slots agree."""
        leases: dict[int, int] = {}
        for client in (*clients, self.own):
            for slot, (generation, count) in client.leases.items():
                block = self._ram.by_slot[slot]
                assert block.generation == generation, "a lease outlived its slot"
                leases[slot] = leases.get(slot, 0) + count
        for slot, block in self._ram.by_slot.items():
            assert block.leases == leases.get(slot, 0), f"leases of slot {slot} differ"
            reserved = block.state is RamState.RESERVED
            assert not reserved or block.leases, "a reserved slot leaked"
