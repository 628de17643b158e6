"""How fast grouping is, against what follows the paper's formulas pair by pair, and against one matrix product.

    python benchmarks/grouping.py [--pools 1000,10000,100000]

First in one process, then by HTTP over registered vectors.

Ours is the whole pass: pooling of the source vectors (n, 100, 768) and of the target, ranking, decisions, trace. The
literal one computes every sim(T1, T2) of Eq. 2 where the formulas name it, each time from the two (100, 768) vectors:
for the ranking, and for KC (Eq. 4) of each group that a strategy looks at. With 100 sources and more it would take
minutes to hours; then its time is the number of similarities that the pass needs, counted, times the time of one,
measured on a sample, and marked `~`. Arrays are float32.

How much the literal `greedy` computes depends on how many sources it takes. So there are two kinds of instance:
`alike`, where each source is nearer to the others the further down it ranks, and all are taken; and `unlike`, where
sources share nothing but a part of the target, and KC soon falls. What pooling alone takes stands beside ours: no pass
can be faster.

By HTTP: `POST /groupings` with `greedy`, at most 32 members and no candidates named, so over all vectors of an
initialization (r = 1, d = 768, clustered as in benchmarks/fill.py), against the floor of one product of the same
matrix, in memory, with a vector.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpv.grouping import Strategy, group
from tpv.similarity import pool

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.served import filled, registry

Floats = NDArray[np.float32]
Literal = Callable[[Floats, Floats], list[int]]  #: members, for a target and sources

SIZES = (6, 24, 100, 1000)
SHAPE = (100, 768)
MEASURED_WHOLE = 24  #: sources up to which the literal pass runs whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", default="1000,10000,100000", help="sizes of the registered pools, or nothing")
    pools = [int(size) for size in parser.parse_args().pools.split(",") if size]
    in_process()
    over_http(pools)


def over_http(pools: list[int]) -> None:
    print(f"\n{'':26}{'taken':>7}{'p50 ms':>10}{'p95 ms':>10}{'floor ms':>10}{'ratio':>8}")
    for count in pools:
        with registry() as client:
            matrix = filled(client, "pool", count, SHAPE[1])
            client.vectors.register("target", vector=matrix[:20].mean(axis=0)[None], initialization="pool", task="t")
            answer = client.groupings.create("target", max_size=32)
            times = sorted(timed(lambda: client.groupings.create("target", max_size=32))[1] for _ in range(40))
        floor = median(partial(np.matmul, matrix, matrix[0]))
        p50, p95 = (times[int(len(times) * part)] * 1e3 for part in (0.5, 0.95))
        figures = f"{len(answer.members):7}{p50:10.1f}{p95:10.1f}{floor * 1e3:10.2f}{p50 / floor / 1e3:8.1f}"
        print(f"{f'greedy, {count} by HTTP':26}{figures}", flush=True)


def in_process() -> None:
    print(f"{'':26}{'taken':>7}{'pooling ms':>12}{'ours ms':>10}{'literal ms':>15}{'ratio':>10}")
    for n in SIZES:
        for kind in ("alike", "unlike"):
            target, sources = instance(n, kind)
            compare(f"greedy, {n} {kind}", target, sources, "greedy", literal_greedy)
            compare(f"prefix, {n} {kind}", target, sources, "prefix", literal_prefix)


def compare(name: str, target: Floats, sources: Floats, strategy: Strategy, literal: Literal) -> None:
    members = ours_pass(target, sources, strategy)
    ours = median(lambda: ours_pass(target, sources, strategy))
    pooling = median(lambda: (pool(target), pool(sources)))
    estimated = len(sources) > MEASURED_WHOLE
    if estimated:
        took = similarities_of(strategy, target, sources) * seconds_of_one(sources)
    else:
        found, took = timed(lambda: literal(target, sources))
        assert found == members
    mark = "~" if estimated else ""
    times = f"{pooling * 1e3:12.2f}{ours * 1e3:10.2f}{mark:>2}{took * 1e3:13,.1f}"
    figures = f"{len(members):7}{times}{took / ours:10,.0f}"
    print(f"{name:26}{figures}", flush=True)


def instance(n: int, kind: str) -> tuple[Floats, Floats]:
    """A target (100, 768) and sources (n, 100, 768)."""
    draw = np.random.default_rng(n)
    target, other = draw.normal(size=(2, *SHAPE)).astype(np.float32)
    steps = np.linspace(0, 1, n, dtype=np.float32)[:, None, None]
    if kind == "alike":
        return target, (2 - steps) * target + 4 * (1 + steps) * other
    noise = draw.standard_normal((n, *SHAPE), dtype=np.float32)
    return target, steps * target + noise


def ours_pass(target: Floats, sources: Floats, strategy: Strategy) -> list[int]:
    return list(group(pool(target), pool(sources), strategy=strategy).members)


def sim(a: Floats, b: Floats) -> float:
    """Eq. 2."""
    return float(a.mean(axis=0) @ b.mean(axis=0))


def consistency(vectors: list[Floats]) -> float:
    """Eq. 4."""
    pairs = [sim(a, b) for a, b in combinations(vectors, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0


def ranked(target: Floats, sources: Floats) -> list[tuple[float, int]]:
    return sorted(((sim(source, target), index) for index, source in enumerate(sources)), reverse=True)


def literal_greedy(target: Floats, sources: Floats) -> list[int]:
    """Algorithm 2, line by line."""
    members: list[int] = []
    for similarity, index in ranked(target, sources):
        group = [sources[i] for i in members]
        contribution = consistency([*group, sources[index]]) - consistency(group)
        if similarity >= 0 and contribution >= 0:
            members.append(index)
    return members


def literal_prefix(target: Floats, sources: Floats) -> list[int]:
    """KC of each prefix of the ranking without negative sources."""
    positive = [index for similarity, index in ranked(target, sources) if similarity >= 0]
    prefixes = [positive[:size] for size in range(1, len(positive) + 1)]
    return max(prefixes, key=lambda prefix: consistency([sources[i] for i in prefix]), default=[])


def similarities_of(strategy: Strategy, target: Floats, sources: Floats) -> int:
    """How many similarities the literal pass computes: those of the ranking, and the pairs of every group."""
    trace = group(pool(target), pool(sources), strategy=strategy).trace
    pairs = size = 0
    for decision in trace:
        if strategy == "greedy":
            pairs += size * (size + 1) // 2 + size * (size - 1) // 2  # with this source, and without it
            size += decision.taken
        elif decision.similarity >= 0:
            size += 1
            pairs += size * (size - 1) // 2
    return len(sources) + pairs


def seconds_of_one(sources: Floats) -> float:
    """One similarity of Eq. 2, over the pairs of fifty sources."""
    pairs = list(combinations(sources[:50], 2))
    return timed(lambda: [sim(a, b) for a, b in pairs])[1] / len(pairs)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def median(call: Callable[[], object], repeats: int = 15) -> float:
    call()
    return statistics.median(timed(call)[1] for _ in range(repeats))


if __name__ == "__main__":
    main()
