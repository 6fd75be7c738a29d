"""The governor's law on invented hosts, in simulated time: switches, reversals, calls over budget.

    python -m benchmarks.governor_replay [--seeds 900:910]

A host is a factor on the recorded time of every call: steps of load, a slow random walk, bursts,
pauses, spikes and noise. A call of the largest profile and a governed one take turns, as in
benchmarks/governor.py. The constants of the law were chosen on other seeds; a minute.
"""

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

COSTS = tuple(ms / 1e3 for ms in (4.88, 5.61, 6.32, 6.98, 7.64, 7.88, 8.10, 8.33))
"""Recorded p95 of MiniLM's profiles, seconds."""
ROOM = 1.1
"""Budget over the largest profile's recorded p95."""
STEP_S = 0.01
"""Of the host's random walk."""
REVERSAL_S = 10.0
RECOVERY_S = 2.0
SPANS = ((5.0, 17.0), (30.0, 42.0))
"""Two rounds of load, seconds."""


@dataclass(frozen=True, slots=True)
class Host:
    """What makes calls slower than recorded.

    Attributes:
        seed: Of everything that is drawn.
        load: Factor while another program works.
        spans: When it does.
        end: Of the trace, seconds.
        noise: Deviation of the logarithm of each call.
        walk: (Deviation of the logarithm, seconds that it remembers) of the wandering speed.
        bursts: (A second, mean seconds, largest factor).
        pauses: A second; of 30 to 150 ms, two to five times as slow.
        slices: (Share of calls, milliseconds) that wait for the other program besides.
        spikes: Share of calls that take two to six times as long.
        bias: Median over recorded time on the quiet host.
        slower: Factor on all costs.
    """

    seed: int
    load: float
    spans: tuple[tuple[float, float], ...] = SPANS
    end: float = 50.0
    noise: float = 0.015
    walk: tuple[float, float] = (0.0, 1.0)
    bursts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    pauses: float = 0.0
    slices: tuple[float, float] | None = (0.1, 1.5)
    spikes: float = 0.002
    bias: float = 1 / 1.03
    slower: float = 1.0

    def loaded(self, at: float) -> bool:
        """Whether the other program works."""
        return any(begin <= at < end for begin, end in self.spans)

    def speed(self) -> list[float]:
        """Logarithm of the factor that walk, bursts and pauses make, every `STEP_S`."""
        draw = random.Random(self.seed)
        deviation, memory = self.walk
        value = draw.gauss(0, deviation) if deviation else 0.0
        keep = math.exp(-STEP_S / memory)
        found = []
        for _ in range(int(self.end / STEP_S) + 200):
            value = keep * value + math.sqrt(1 - keep * keep) * draw.gauss(0, 1) * deviation
            found.append(value)
        rate, mean, most = self.bursts
        self._add(found, draw, rate, lambda: (draw.uniform(0.3, 2) * mean, draw.uniform(1.1, most)))
        self._add(found, draw, self.pauses, lambda: (draw.uniform(0.03, 0.15), draw.uniform(2, 5)))
        return found

    def _add(
        self,
        found: list[float],
        draw: random.Random,
        rate: float,
        event: Callable[[], tuple[float, float]],
    ) -> None:
        at = draw.expovariate(rate) if rate else math.inf
        while at <= self.end:
            seconds, factor = event()
            for k in range(int(at / STEP_S), min(len(found), int((at + seconds) / STEP_S))):
                found[k] += math.log(factor)
            at += draw.expovariate(rate)


@dataclass(slots=True)
class Run:
    """Calls of a replay.

    Attributes:
        host: What it ran on.
        calls: (End, profile, whether it was over the budget) of governed calls.
    """

    host: Host
    calls: list[tuple[float, int, bool]] = field(default_factory=list)

    def switches(self) -> list[tuple[float, int]]:
        """(When, by how many profiles)."""
        pairs = pairwise(self.calls)
        return [(b[0], b[1] - a[1]) for a, b in pairs if a[1] != b[1]]

    def reversals(self) -> int:
        """Switches against the one before, soon after it."""
        pairs = pairwise(self.switches())
        return sum(a[1] * b[1] < 0 and b[0] - a[0] <= REVERSAL_S for a, b in pairs)

    def over(self) -> float:
        """Share of the calls under load that were over the budget."""
        under = [over for at, _, over in self.calls if self.host.loaded(at)]
        return sum(under) / len(under)

    def late(self) -> int:
        """Loads after which the profile before them was not back in time."""
        count = 0
        for begin, end in self.host.spans:
            before = [i for at, i, _ in self.calls if at < begin][-1]
            back = [at for at, i, _ in self.calls if at >= end and i >= before]
            count += not back or back[0] - end > RECOVERY_S
        return count


def replay(host: Host) -> Run:
    """Play a trace."""
    from t3c.runtime.loop import Loop

    costs = [host.slower * cost for cost in COSTS]
    budget = ROOM * costs[-1]
    loop, run, speed = Loop(costs, budget, 95.0), Run(host), host.speed()
    draw = random.Random(host.seed + 7777)
    index, now = loop.index, 0.0

    def call(profile: int) -> float:
        factor = host.load if host.loaded(now) else 1.0
        factor *= host.bias * math.exp(speed[int(now / STEP_S)] + draw.gauss(0, host.noise))
        seconds = costs[profile] * factor
        if host.slices is not None and host.loaded(now) and draw.random() < host.slices[0]:
            seconds += host.slices[1] / 1e3 * draw.uniform(0.5, 1.5)
        return seconds * draw.uniform(2, 6) if draw.random() < host.spikes else seconds

    while now < host.end:
        now += call(len(costs) - 1)
        if int(now / STEP_S) >= len(speed) - 1:
            break
        seconds = call(index)
        now += seconds
        run.calls.append((now, index, seconds > budget))
        index = loop.observe(now, seconds / costs[index])
    return run


def hosts(seed: int) -> dict[str, Host]:
    """Name -> host; each draws its constants anew."""
    uniform = random.Random(seed * 31 + 5).uniform
    load, noise = uniform(1.2, 1.35), uniform(0.008, 0.025)
    plain: dict[str, Any] = {"seed": seed, "load": load, "noise": noise}
    fast = uniform(0.02, 0.05), uniform(1, 6)
    slow = uniform(0.03, 0.07), uniform(8, 30)
    mild = uniform(0.01, 0.03), uniform(1, 8)
    return {
        "steady host": Host(**plain),
        "fast wander (2 to 5 %, 1 to 6 s)": Host(**plain, walk=fast),
        "slow wander (3 to 7 %, 8 to 30 s)": Host(**plain, walk=slow),
        "slower than recorded by up to 4 %": Host(
            **plain, walk=mild, bias=uniform(1.0, 1.07) / 1.03
        ),
        "wander, bursts of 1.1 to 1.5 times, pauses": Host(
            **plain, walk=mild, bursts=(0.08, 0.8, 1.5), pauses=0.06
        ),
        "more bursts": Host(**plain, walk=(0.015, 3.0), bursts=(0.12, 0.6, 1.5), pauses=0.08),
        "calls that spread by 12 %": Host(
            seed, load, noise=0.12, walk=(0.02, 2.0), slices=(0.3, 2.5), bias=1 / 1.22, spikes=0.005
        ),
        "slow calls that spread by 10 to 18 %": Host(
            seed,
            uniform(1.15, 1.4),
            noise=uniform(0.1, 0.18),
            walk=(uniform(0.03, 0.06), uniform(0.5, 4)),
            slices=None,
            bias=1 / 1.3,
            spikes=0.01,
            slower=5.0,
        ),
        "100 s, one load of 80 s, bursts": Host(
            seed,
            uniform(1.15, 1.5),
            spans=((5.0, 85.0),),
            end=100.0,
            noise=noise,
            walk=fast,
            bursts=(0.05, 0.8, 1.4),
        ),
    }


def main() -> None:
    """Replay, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="900:910", help="first:behind the last")
    first, last = map(int, parser.parse_args().seeds.split(":"))
    names = list(hosts(first))
    print("| host | switches (most) | reversals | over budget under load, % (most) | late |")
    print("|---|---|---|---|---|")
    for name in names:
        runs = [replay(hosts(seed)[name]) for seed in range(first, last)]
        switches = [len(run.switches()) for run in runs]
        reversals = sum(run.reversals() for run in runs) / len(runs)
        over = [100 * run.over() for run in runs]
        loads = sum(len(run.host.spans) for run in runs)
        print(
            f"| {name} | {sum(switches) / len(runs):.1f} ({max(switches)}) | {reversals:.1f} | "
            f"{sum(over) / len(runs):.1f} ({max(over):.1f}) | "
            f"{sum(run.late() for run in runs)} of {loads} |"
        )


if __name__ == "__main__":
    main()
