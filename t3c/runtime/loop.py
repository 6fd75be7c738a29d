"""The control law of the governor: from observed slowdowns to the profile to run next.

Numbers in, a number out: no clock, no session, no memory asked for after construction, so that it
can be tested on invented traces and written again in another language line by line.

One estimate drives it: the slowdown, measured cost over recorded cost of the profile that ran. It
is the same for all profiles to first order, so that a small profile tells what a large one would
take: going up needs no trial under load. Its stated percentile over the last calls is compared
with the room that the budget leaves each profile.
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
    """Constants of the loop. The defaults keep the tests' traces, and are not fitted to a device.

    Attributes:
        window: Calls that the percentile is taken over, at most.
        horizon_s: Calls older than this are forgotten, as long as enough newer ones are known.
        keep: So many are enough for staying: fewer cannot show a percentile of slow calls.
        least: So many are enough for going up, so that slow calls recover, too.
        down: Factor on the predicted cost above which the present profile is left: margin for the
            error of a percentile of a window.
        up: The same for a larger profile; the difference to `down` is the hysteresis.
        probe: The same after a time of `patience`, one step up, for budgets close to a cost.
        run: So many calls over the budget in a row are a new load: older calls are forgotten.
        dwell_s: Time after a switch before going up.
        trial_s: A switch up that is taken back within this time, or `keep` calls, has failed.
        hold_s: Time without going up after a failure; doubles with each further one.
        longest_hold_s: Its limit.
        better: Share of the slowdown of the failed attempt below which it is tried again at once.
        patience: In units of the `hold_s` now in force: so long after a switch `probe` holds.
    """

    window: int = 128
    horizon_s: float = 1.0
    keep: int = 32
    least: int = 8
    down: float = 1.02
    up: float = 1.06
    probe: float = 1.035
    run: int = 3
    dwell_s: float = 0.25
    trial_s: float = 1.0
    hold_s: float = 0.5
    longest_hold_s: float = 60.0
    better: float = 0.9
    patience: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("window", "keep", "least", "run"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if max(self.keep, self.least, self.run) > self.window:
            raise ValueError(f"a window of {self.window} calls is below keep, least or run")
        for name in ("horizon_s", "dwell_s", "trial_s", "hold_s", "longest_hold_s", "patience"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a positive, finite number")
        if not 1.0 <= self.down <= self.probe <= self.up < math.inf:
            raise ValueError(
                f"need 1 <= down <= probe <= up, got {self.down}, {self.probe} and {self.up}"
            )
        if not 0.0 < self.better <= 1.0:
            raise ValueError(f"better is {self.better}; give a share above 0 and at most 1")


@final
class Window:
    """The last slowdowns, by age and by size, in memory that is never asked for again."""

    def __init__(self, law: Law, percentile: float, least: int) -> None:
        """Take limits.

        Args:
            law: Its `window` and `horizon_s` are used.
            percentile: Of the calls that may lie above the tail, 50 to below 100.
            least: Calls that are known however old they are.
        """
        self._law, self._least = law, least
        self._share = percentile / 100.0
        self._times = array("d", bytes(8 * law.window))
        self._values = array("d", bytes(8 * law.window))
        self._next = 0
        self.sorted: list[float] = []

    def __len__(self) -> int:
        """Calls that are known."""
        return len(self.sorted)

    def push(self, now_s: float, value: float) -> None:
        """Take one more, and forget what is too old or too much."""
        law = self._law
        if len(self.sorted) == law.window:
            self._forget()
        self._times[self._next], self._values[self._next] = now_s, value
        self._next = (self._next + 1) % law.window
        insort(self.sorted, value)
        while (
            len(self.sorted) > self._least and self._times[self._oldest()] < now_s - law.horizon_s
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
        return (self._next - len(self.sorted)) % self._law.window

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
        self._window = Window(self._law, percentile, self._law.keep)
        self._recent = Window(self._law, percentile, self._law.least)
        self._run = 0
        self._switched = -math.inf
        self._since = 0
        self._from: int | None = None
        self._believed = math.inf
        self._failed_at = 0.0
        self._hold = self._law.hold_s
        self._hold_until = -math.inf
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
        if window.above(room / law.down) > max(1, spare):
            if self.index > self._least:
                self._down(now_s, tail)
        elif self.index < self._most and len(recent) >= law.least:
            self._up(now_s, recent.tail(self._spare(recent)))
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

    def _down(self, now_s: float, tail: float) -> None:
        law, target = self._law, self.fitting(tail * self._law.up, self.index - 1)
        if self._from is not None:  # the last switch went up
            if now_s - self._switched < law.trial_s or self._since < law.keep:
                self.failed += 1
                self._hold_until = now_s + self._hold
                self._hold = min(2.0 * self._hold, law.longest_hold_s)
                self._failed_at = self._believed
                target = max(target, self.fitting(tail * law.down, self._from))
            else:
                self._hold = law.hold_s
        self.downs += 1
        self._from = None
        self._switched, self._since = now_s, 0
        self.index = target

    def _up(self, now_s: float, tail: float) -> None:
        law, waited = self._law, now_s - self._switched
        if waited < law.dwell_s:
            return
        if now_s < self._hold_until and tail > law.better * self._failed_at:
            return
        target = self.fitting(tail * law.up, self._most)
        if target <= self.index:
            near = self._costs[self.index + 1] * tail * law.probe <= self._budget
            if not near or waited < law.patience * self._hold:
                return
            target = self.index + 1
        self._window.keep_last(len(self._recent))  # what is older is over
        self.ups += 1
        self._from = self.index
        self._switched, self._since = now_s, 0
        self._believed = tail
        self.index = target
