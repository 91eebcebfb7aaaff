"""Where an entry of fixed size keeps what a reach can read: formulas of a token's position, the same operations at any length.

The entry of a cache that grows (windowed.py) has no slot too many, but which slot a token gets depends on what lay there before.

Letters: B batch, T new tokens, G key/value heads, d head width.
"""

from typing import Any

import torch
from torch import Tensor


class Ring:
    """Slots for the tokens that last, in their order, then slots for the window, taken in turn.

    Where sinks alone last, the turns begin behind them. Where blocks last, a token of theirs is written to both; its lasting
    slot is read once the window has moved on.

    Args:
        reach: the Reach whose tokens are kept.
        capacity: tokens of the longest text.

    Attributes:
        in_order: slots are filled from the first to the last, and all that are filled are read.
    """

    def __init__(self, reach: Any, capacity: int):
        self.reach, self.in_order = reach, reach.stride == 0
        self.start = reach.sink if self.in_order else 0
        self.lasting, self.window = reach.lasting(capacity), min(reach.window, capacity)
        self.slots = self.lasting + self.window

    def places(self, count: Tensor) -> Tensor:
        """Position held by each slot once `count` [B] tokens of a row were seen, [B, slots]; -1 is an empty slot."""
        rank, turn = (torch.arange(slots, device=count.device) for slots in (self.lasting, self.window))
        count = count[:, None]
        early, last = self.reach.nth_lasting(rank)[None], count - 1 - self.start
        late = last - (last - turn) % self.window
        return torch.cat([torch.where(early < count, early, -1), torch.where(late < 0, -1, late + self.start)], dim=1)

    def read(self, count: Tensor) -> Tensor:
        """As `places`, but -1 also for lasting slots whose token is still in the window: each token is there once."""
        if self.in_order:
            return self.places(count)
        early, late = self.places(count).split([self.lasting, self.window], dim=1)
        return torch.cat([torch.where(early < count[:, None] - self.window, early, -1), late], dim=1)

    def write(self, pairs: list[tuple[Tensor, Tensor]], before: Tensor, real: Tensor | None) -> None:
        """Put new tokens into their slots, in place.

        Args:
            pairs: what is held, [B, G, slots, d], and what is new of the same, [B, G, T, d]: keys and values.
            before: tokens that each row has seen, [B].
            real: [B, T] bool, False on left padding; None is no padding.
        """
        new = pairs[0][1]
        if new.shape[2] == 1 and real is None:
            turn, lasts = self.lasting + (before - self.start) % self.window, self.reach.lasts(before)
            slot = torch.where(lasts, before, turn) if self.in_order else turn
            rank = torch.where(lasts, self.reach.lasting(before), 0)
            for held, fresh in pairs:
                held.scatter_(2, _spread(slot, fresh), fresh)
                if not self.in_order:
                    # What does not last leaves the first slot as it is.
                    index = _spread(rank, fresh)
                    held.scatter_(2, index, torch.where(lasts[:, None, None, None], fresh, held.gather(2, index)))
            return
        tokens = torch.full_like(before, new.shape[2]) if real is None else real.sum(dim=1)
        place = self.places(before + tokens)
        # Padding is on the left, so a count is enough.
        column = (place - (before + tokens)[:, None] + new.shape[2]).clamp(min=0)
        kept = (place < before[:, None])[:, None, :, None]
        for held, fresh in pairs:
            source = column[:, None, :, None].expand(-1, fresh.shape[1], -1, fresh.shape[3])
            held.copy_(torch.where(kept, held, fresh.gather(2, source)))


def _spread(slot: Tensor, like: Tensor) -> Tensor:
    """[B] -> what gather and scatter want for one token, [B, G, 1, d]."""
    return slot[:, None, None, None].expand(-1, like.shape[1], 1, like.shape[3])
