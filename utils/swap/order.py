"""The order in which streamed weights are used: learned in a first pass, replayed, and learned again if it changes."""

import math
from collections.abc import Collection, Hashable, Sequence


class WeightOrder:
    """Which weights come next, for each kind of pass (training, without gradient).

    While a pass is being learned, nothing is known ahead: `learning` is true and `future` is empty.
    """

    def __init__(self):
        self.learning = True
        self.future: Sequence[int] = ()  # the pass's uses, then those of the pass that followed it last time
        self.done = 0  # uses of this pass so far
        self._kind: Hashable = None
        self._seen: list[int] = []
        self._plans: dict[Hashable, list[int]] = {}
        self._followers: dict[Hashable, Hashable] = {}

    def begin(self, kind: Hashable) -> None:
        """A pass of this kind begins; the one before has ended, perhaps by an exception."""
        if self._seen and self.learning:
            self._plans[self._kind] = self._seen
        self._followers[self._kind] = kind
        self._kind, self._seen, self.done = kind, [], 0
        self.learning = kind not in self._plans
        self.future = [] if self.learning else self._plans[kind] + self._plans.get(self._followers.get(kind), [])

    def used(self, weight: int) -> None:
        """`weight` is used now; if the plan says otherwise, the pass is learned from here on."""
        if not self.learning and (self.done == len(self._plans[self._kind]) or self.future[self.done] != weight):
            self.learning = True
            self.future = []
        self._seen.append(weight)
        self.done += 1


def evictions(uses: Sequence[int], held: Collection[int], slots: int) -> tuple[set[int], set[int]]:
    """How `slots` slots, which hold the weights `held` at first, serve `uses` with few loads, each made one use ahead.

    Returns the held weights that give up their slots before they are used, and the positions in `uses` after which the
    weight that is used there gives up its slot. Belady 1966: if room is needed, the weight goes that is needed last.
    """
    next_use, later = [math.inf] * len(uses), {}
    for position in range(len(uses) - 1, -1, -1):
        next_use[position] = later.get(uses[position], math.inf)
        later[uses[position]] = position
    again = {weight: later.get(weight, math.inf) for weight in held}
    last_use: dict[int, int] = {}
    unused, positions = set(), set()
    for position, weight in enumerate(uses):
        for needed in uses[position : position + min(slots, 2)]:
            if needed in again:
                continue
            if len(again) == slots:
                evicted = max(again, key=again.get)
                del again[evicted]
                if evicted in last_use:
                    positions.add(last_use[evicted])
                else:
                    unused.add(evicted)
            again[needed] = position
        again[weight] = next_use[position]
        last_use[weight] = position
    return unused, positions
