"""Contestants run in turn, on cold caches, so that what the machine does to one it does to all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from bench.limits import Limits

Run = Callable[[], object] | Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Contestant:
    """What is timed, and the work it cannot avoid.

    `run` is one call, or calls that are timed together, one per layer: on cold caches the interpreter and the code are
    cold for the first, as they are for one layer of a model, and the data for all. Everything else is of one call.
    `reads` and `copies` are bytes: a copied byte is read once and written once. `rate` names the limit that the flops
    are held against: fma, bf16 where both factors are, int8 where the products are of bytes. `serial`: the time floor
    is the sum of memory and arithmetic rather than the larger of the two.
    """

    name: str
    run: Run
    reads: float
    flops: float
    copies: float = 0.0
    rate: str = "fma"
    serial: bool = False
    peer: bool = False


@dataclass
class Race:
    """One case: its contestants, and the names of those that the others are compared with."""

    op: str
    label: str
    threads: int
    contestants: list[Contestant]
    against: list[str]
    cold: bool = True
    inner: int = 1  # how often a timing repeats the run


@dataclass
class Result:
    op: str
    label: str
    threads: int
    name: str
    peer: bool
    seconds: float
    spread: float  # half the distance between the quartiles, relative to the median
    rounds: int
    gbytes: float
    gflops: float
    bound: str
    percent: float
    ratios: dict[str, float] = field(default_factory=dict)  # time of the other / own time, median over the rounds


def in_turn(
    runs: Mapping[str, Run],
    before: Callable[[], object] | None = None,
    inner: int = 1,
    min_rounds: int = 5,
    max_rounds: int = 25,
    budget: float = 4.0,
) -> dict[str, list[float]]:
    """Seconds per call of each, round by round: `min_rounds` at least, then until the budget in seconds is spent.

    `before` runs ahead of every timing, outside of it. The order shifts by one each round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = {name: run if isinstance(run, Sequence) else (run,) for name, run in runs.items()}
    for layers in calls.values():
        for call in layers:
            call()
    order = list(runs)
    began = time.perf_counter()
    for turn in range(max_rounds):
        if turn >= min_rounds and time.perf_counter() - began > budget:
            break
        for name in order:
            if before is not None:
                before()
            layers = calls[name]
            start = time.perf_counter()
            for _ in range(inner):
                for call in layers:
                    call()
            times[name].append((time.perf_counter() - start) / inner / len(layers))
        order = order[1:] + order[:1]
    return times


def run(race: Race, limits: Limits, min_rounds: int = 5, max_rounds: int = 25, budget: float = 4.0) -> list[Result]:
    """Times a race, the limits of the machine between its runs."""
    torch.set_num_threads(race.threads)
    rates: dict[str, list[float]] = {"fma": [], "bf16": [], "int8": [], "copy": [], "read": []}
    copied = int(max(c.copies for c in race.contestants))

    def sample() -> None:
        rates["fma"].append(limits.fma(race.threads))
        rates["bf16"].append(limits.bf16(race.threads))
        rates["int8"].append(limits.int8(race.threads))
        rates["copy"].append(limits.copy(race.threads, copied))
        rates["read"].append(limits.read(race.threads))  # last, as it empties the caches

    sample()
    runs = {c.name: c.run for c in race.contestants}
    before = sample if race.cold else None
    times = in_turn(runs, before, race.inner, min_rounds, max_rounds, budget)
    # What the machine can do is the best it did; a median would be of what others left of it.
    best = {name: max(values) for name, values in rates.items()}
    return [_result(race, c, times, best) for c in race.contestants]


def _result(race: Race, c: Contestant, times: dict[str, list[float]], rates: dict[str, float]) -> Result:
    mine = sorted(times[c.name])
    seconds = median(mine)
    memory = c.reads / rates["read"] + c.copies / rates["copy"]
    arithmetic = c.flops / rates[c.rate]
    floor = memory + arithmetic if c.serial else max(memory, arithmetic)
    return Result(
        op=race.op,
        label=race.label,
        threads=race.threads,
        name=c.name,
        peer=c.peer,
        seconds=seconds,
        spread=(mine[(3 * len(mine)) // 4] - mine[len(mine) // 4]) / 2 / seconds,
        rounds=len(mine),
        gbytes=(c.reads + 2 * c.copies) / seconds / 1e9,
        gflops=c.flops / seconds / 1e9,
        bound="bytes + flops" if c.serial else "bytes" if memory >= arithmetic else "flops",
        percent=100 * floor / seconds,
        ratios={
            other: median(b / a for a, b in zip(times[c.name], times[other], strict=True))
            for other in race.against
            if other in times and other != c.name
        },
    )


def timed(races: Iterator[Race], limits: Limits, quick: bool) -> Iterator[tuple[Race, list[Result]]]:
    for race in races:
        yield race, run(race, limits, 3 if quick else 5, 3 if quick else 25, 0.2 if quick else 6.0)
