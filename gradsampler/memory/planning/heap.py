# SPDX-License-Identifier: Apache-2.0
"""Sizes in place of tensors: what is alive, by counted references, and at most."""

from collections.abc import Collection

from gradsampler.engine.program import Slot


class Block:
    """Stands for a tensor."""

    def __init__(self, size: int) -> None:
        self.size, self.users = size, 1


Table = dict[Slot, Block]


class Heap:
    """Counts blocks from when they are made until the last user drops them."""

    def __init__(self) -> None:
        self.live = self.peak = 0  # bytes

    def new(self, size: int) -> Block:
        """A block with one user."""
        self.live += size
        self.touch(0)
        return Block(size)

    def drop(self, block: Block) -> None:
        """One user less."""
        block.users -= 1
        if block.users == 0:
            self.live -= block.size

    def clear(self, table: Table, slots: Collection[Slot] | None = None) -> None:
        """Drops those of a table's blocks that are in ``slots``, or all."""
        for slot in list(table if slots is None else slots):
            if slot in table:
                self.drop(table.pop(slot))

    def touch(self, size: int) -> None:
        """So many bytes more for a moment."""
        self.peak = max(self.peak, self.live + size)


def shared(block: Block) -> Block:
    """The block with one user more."""
    block.users += 1
    return block


def copied(table: Table) -> Table:
    """A table that is one more user of each block."""
    return {slot: shared(block) for slot, block in table.items()}
