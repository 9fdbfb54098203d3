"""The order in which streamed weights are used: learned in a first pass, replayed, learned anew where it changed."""

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence


class WeightOrder:
    """What comes next, for each kind of pass (training, without gradient).

    While a pass is learned nothing is known ahead: `learning` is true and `future` is empty.
    """

    def __init__(self):
        self.learning = True
        self.future: Sequence[int] = ()  # the pass's uses, then those of the pass that usually follows
        self.done = 0  # uses of this pass so far
        self._positions: dict[int, list[int]] = {}
        self._kind: Hashable = None
        self._seen: list[int] = []
        self._plans: dict[Hashable, list[int]] = {}
        self._followers: dict[Hashable, Hashable] = {}

    def begin(self, kind: Hashable) -> None:
        """A pass of this kind begins; the one before has ended, if only by an exception."""
        if self._seen and self.learning:
            self._plans[self._kind] = self._seen
        self._followers[self._kind] = kind
        self._kind, self._seen, self.done = kind, [], 0
        self.learning = kind not in self._plans
        self.future, self._positions = (), {}
        if not self.learning:
            self._look_ahead()

    def used(self, weight: int) -> None:
        """`weight` is used now."""
        if not self.learning and (self.done == len(self._plans[self._kind]) or self.future[self.done] != weight):
            self.learning = True
            self.future, self._positions = (), {}
        self._seen.append(weight)
        self.done += 1

    def next_use(self, weight: int) -> float:
        """The position in `future` at which `weight` is needed again; infinity where it is not known to be."""
        positions = self._positions.get(weight, ())
        later = bisect_right(positions, self.done - 1)
        return positions[later] if later < len(positions) else math.inf

    def _look_ahead(self) -> None:
        follower = self._followers.get(self._kind)
        self.future = self._plans[self._kind] + self._plans.get(follower, [])
        for position, weight in enumerate(self.future):
            self._positions.setdefault(weight, []).append(position)
