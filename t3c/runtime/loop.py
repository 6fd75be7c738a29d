"""The control law of the governor: from observed slowdowns to the profile to run next.

Numbers in, a number out: no clock, no session, no memory asked for after construction, so that it
can be tested on invented traces and written again in another language line by line.

One estimate drives it: the slowdown, measured cost over recorded cost of the profile that ran. It
is the same for all profiles to first order, so that a small profile tells what a large one would
take: going up needs no trial under load. Its stated percentile over the last calls is compared
with the room that the budget leaves each profile.

Down is quick, up has two ways. A load has ended when the slowdown fell clearly and the profile that
ran before the load fits again. Otherwise a device only wanders: its envelope counts, which rises
with the slowdown and sinks slowly, and a long time passes between switches.
"""

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final


@dataclass(frozen=True, slots=True)
class Law:
    """Constants of the loop.

    Chosen on traces of an invented host (steps, wander, bursts, pauses, ramps) and on recorded
    ones, checked on seeds that were not used: docs/decisions.md, Governor.

    Attributes:
        window: Calls that the percentile is taken over, at most.
        horizon_s: Calls older than this are forgotten, as long as enough newer ones are known.
        recent_s: The same where going up is judged.
        keep: So many are needed for leaving a profile, but after a `run` or soon after a switch up:
            fewer cannot show a percentile of slow calls.
        least: So many are needed for going up, so that slow calls recover, too.
        run: So many calls over the budget in a row are a new load: older calls are forgotten.
        down: Factor on the cost of the calls above which the present profile is left.
        below: The same for the profile that is taken instead: the first calls of a load tell
            little, and a step too many costs less than another switch.
        up: The same for a larger profile while the slowdown wanders, on its envelope.
        back: The same after a clear fall.
        better: A slowdown of at most this share of the envelope is a clear fall.
        settle_s: After a clear fall the profile that fits must stay the same for this time.
        doubt_s: The same where it is smaller than the one before the load: a lull of a load looks
            like that.
        memory_s: Time in which the envelope sinks to a third of the way.
        dwell_s: Time after a switch before going up.
        patience_s: The same without a clear fall. A profile that was kept for so long is the one
            before a load.
        trial_s: A switch up that is taken back within this time, or `keep` calls, has failed; a
            second switch down within it goes one profile further.
        hold_s: Time without going up after a failure; doubles with each further one, halves with
            each success.
        longest_hold_s: Its limit. A slowdown of `better` times that of the failed switch ends it.
    """

    window: int = 128
    horizon_s: float = 1.0
    recent_s: float = 0.8
    keep: int = 32
    least: int = 16
    run: int = 8
    down: float = 1.01
    below: float = 1.1
    up: float = 1.04
    back: float = 1.02
    better: float = 0.88
    settle_s: float = 0.15
    doubt_s: float = 2.0
    memory_s: float = 8.0
    dwell_s: float = 0.25
    patience_s: float = 8.0
    trial_s: float = 3.0
    hold_s: float = 2.0
    longest_hold_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("window", "keep", "least", "run"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if max(self.keep, self.least, self.run) > self.window:
            raise ValueError(f"a window of {self.window} calls is below keep, least or run")
        for name in (
            "horizon_s",
            "recent_s",
            "settle_s",
            "doubt_s",
            "memory_s",
            "dwell_s",
            "patience_s",
            "trial_s",
            "hold_s",
            "longest_hold_s",
        ):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive, finite number")
        if not 1.0 <= self.down <= self.back <= self.up <= self.below < math.inf:
            raise ValueError(
                "need 1 <= down <= back <= up <= below, got "
                f"{self.down}, {self.back}, {self.up} and {self.below}"
            )
        if not 0.0 < self.better <= 1.0:
            raise ValueError(f"better is {self.better}; give a share above 0 and at most 1")


@final
class Window:
    """The last slowdowns, by age and by size, in memory that is never asked for again."""

    def __init__(self, size: int, horizon_s: float, percentile: float, least: int) -> None:
        """Take limits.

        Args:
            size: Calls that are known, at most.
            horizon_s: Calls older than this are forgotten.
            percentile: Of the calls that may lie above the tail, 50 to below 100.
            least: Calls that are known however old they are.
        """
        self._size, self._horizon_s, self._least = size, horizon_s, least
        self._share = percentile / 100.0
        self._times = array("d", bytes(8 * size))
        self._values = array("d", bytes(8 * size))
        self._next = 0
        self.sorted: list[float] = []

    def __len__(self) -> int:
        """Calls that are known."""
        return len(self.sorted)

    def push(self, now_s: float, value: float) -> None:
        """Take one more, and forget what is too old or too much."""
        if len(self.sorted) == self._size:
            self._forget()
        self._times[self._next], self._values[self._next] = now_s, value
        self._next = (self._next + 1) % self._size
        insort(self.sorted, value)
        while (
            len(self.sorted) > self._least and self._times[self._oldest()] < now_s - self._horizon_s
        ):
            self._forget()

    def keep_last(self, count: int) -> None:
        """Forget all but so many."""
        while len(self.sorted) > count:
            self._forget()

    def above_allowed(self) -> int:
        """So many of the calls may lie above the percentile."""
        count = len(self.sorted)
        return count - math.ceil(self._share * count - 1e-9)

    def tail(self, spare: int) -> float:
        """The largest value but for `spare` larger ones; 1 where none is known."""
        return self.sorted[-1 - spare] if self.sorted else 1.0

    def above(self, limit: float) -> int:
        """Calls above a limit."""
        return len(self.sorted) - bisect_right(self.sorted, limit)

    def _oldest(self) -> int:
        return (self._next - len(self.sorted)) % self._size

    def _forget(self) -> None:
        self.sorted.pop(bisect_left(self.sorted, self._values[self._oldest()]))


@final
class Loop:
    """Chooses among profiles of known cost so that a percentile of what calls cost keeps a budget.

    Attributes:
        index: The profile to run next.
        ups: Switches to a larger profile.
        downs: Switches to a smaller one.
        failed: Switches up that were taken back soon.
        saturated: Whether even the smallest profile allowed is predicted to be over the budget.
    """

    def __init__(
        self,
        recorded: Sequence[float],
        budget: float,
        percentile: float = 95.0,
        law: Law | None = None,
        most: int | None = None,
        least: int = 0,
    ) -> None:
        """Start at the largest profile whose recorded cost keeps the budget, or at the smallest.

        Args:
            recorded: Cost of each profile, smallest first; raised to the running maximum.
            budget: In the unit of `recorded`.
            percentile: Of recent calls that must keep it, 50 to below 100.
            law: Constants; None: the defaults.
            most: Largest profile that is allowed; None: the last.
            least: Smallest profile that is allowed.

        Raises:
            ValueError: Costs or budget are not positive and finite, or no such percentile or
                profiles.
        """
        if not recorded or not all(0.0 < cost < math.inf for cost in recorded):
            raise ValueError(f"recorded costs are {list(recorded)}; each must be positive, finite")
        if not 0.0 < budget < math.inf:
            raise ValueError(f"the budget is {budget}; give a positive, finite number")
        if not 50.0 <= percentile < 100.0:
            raise ValueError(f"percentile is {percentile}; allowed are 50 to below 100")
        self._costs = array("d", accumulate(recorded, max))
        self._budget = budget
        self._most = len(recorded) - 1 if most is None else most
        self._least = least
        if not 0 <= least <= self._most < len(recorded):
            raise ValueError(
                f"profiles {least} to {self._most} of {len(recorded)}; least and most must be in "
                "order and within"
            )
        self._law = Law() if law is None else law
        size, own = self._law.window, self._law
        self._window = Window(size, own.horizon_s, percentile, own.keep)
        self._recent = Window(size, own.recent_s, percentile, own.least)
        self._run = 0
        self._seen = -math.inf
        self._switched = -math.inf
        self._since = 0
        self._envelope = 0.0
        self._direction = 0
        self._tried = False
        self._believed = 0.0
        self._failed_at = 0.0
        self._hold = self._law.hold_s
        self._hold_until = -math.inf
        self._former = self._home = -1
        self._home_since = -math.inf
        self.ups = self.downs = self.failed = 0
        self.index = self.fitting(1.0, self._most)
        self.saturated = self._costs[least] > budget

    @property
    def slowdown(self) -> float:
        """The percentile of measured over recorded cost of the last calls."""
        return self._window.tail(self._spare(self._window))

    def predicted(self, index: int) -> float:
        """What the profile would cost now, at the percentile."""
        return self._costs[index] * self.slowdown

    def fitting(self, factor: float, most: int) -> int:
        """The largest profile up to `most` whose cost times a factor keeps the budget.

        The smallest that is allowed where none does.
        """
        for index in range(most, self._least, -1):
            if self._costs[index] * factor <= self._budget:
                return index
        return self._least

    def observe(self, now_s: float, ratio: float) -> int:
        """Take one call's slowdown; the profile to run next.

        Args:
            now_s: When it ended, on any clock that does not go back.
            ratio: Measured cost over recorded cost of the profile that ran.
        """
        law, window, recent = self._law, self._window, self._recent
        room = self._budget / self._costs[self.index]
        window.push(now_s, ratio)
        recent.push(now_s, ratio)
        self._since += 1
        self._run = self._run + 1 if ratio > room else 0
        if self._run == law.run:
            window.keep_last(law.run)
            recent.keep_last(law.run)
        spare = self._spare(window)
        tail = window.tail(spare)
        self._sink(now_s, tail)
        if self._tried and now_s - self._switched >= law.trial_s and self._since >= law.keep:
            self._tried = False
            self._hold = max(law.hold_s, 0.5 * self._hold)
        told = self._tried or len(window) >= law.keep or self._run >= law.run
        if told and window.above(room / law.down) > max(1, spare):
            if self.index > self._least:
                self._down(now_s, tail)
        elif self.index < self._most and len(recent) >= law.least:
            self._up(now_s)
        self.saturated = self._costs[self._least] * tail > self._budget
        return self.index

    def _spare(self, window: Window) -> int:
        """So many calls of a window may lie over the budget.

        Those that the percentile allows; a few more where even the smallest profile would have been
        over: leaving a profile for what none avoids gives up accuracy for nothing.
        """
        allowed = window.above_allowed()
        hopeless = window.above(self._budget / self._costs[self._least])
        most = min(allowed + max(2, allowed // 2), len(window) - 1)
        return max(allowed, min(hopeless, most))

    def _sink(self, now_s: float, tail: float) -> None:
        """Let the envelope rise to the slowdown, or sink a little towards it."""
        passed, self._seen = now_s - self._seen, now_s
        if tail >= self._envelope:
            self._envelope = tail
        else:
            self._envelope += (tail - self._envelope) * min(1.0, passed / self._law.memory_s)

    def _down(self, now_s: float, tail: float) -> None:
        law, target = self._law, self.fitting(tail * self._law.below, self.index - 1)
        if self._tried:  # the last switch went up, not long ago
            self.failed += 1
            self._hold_until = now_s + self._hold
            self._hold = min(2.0 * self._hold, law.longest_hold_s)
            self._failed_at = self._believed
        elif self._direction < 0 and now_s - self._switched < law.trial_s:
            target = max(self._least, target - 1)
        kept = now_s - self._switched >= law.patience_s
        self._former = self.index if kept else max(self._former, self.index)
        self.downs += 1
        self._envelope = tail
        self._switch(now_s, target, -1)

    def _up(self, now_s: float) -> None:
        law, recent, waited = self._law, self._recent, now_s - self._switched
        if waited < law.dwell_s:
            return
        tail = recent.tail(self._spare(recent))
        if now_s < self._hold_until and tail > law.better * self._failed_at:
            return
        target = self.index
        if tail <= law.better * self._envelope:
            home = self.fitting(tail * law.back, self._most)
            if home != self._home:
                self._home, self._home_since = home, now_s
            wait = law.settle_s if home >= self._former else law.doubt_s
            if now_s - self._home_since >= wait:
                target = home
        else:
            self._home = -1
            if waited >= law.patience_s:
                target = self.fitting(self._envelope * law.up, self._most)
        if target <= self.index:
            return
        self._window.keep_last(len(recent))  # what is older is over
        self.ups += 1
        if target >= self._former:
            self._former = -1
        self._believed = tail
        self._switch(now_s, target, 1)

    def _switch(self, now_s: float, target: int, direction: int) -> None:
        self._switched, self._since = now_s, 0
        self._direction, self._tried = direction, direction > 0
        self._home = -1
        self.index = target
