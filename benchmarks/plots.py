"""The pictures, from the JSON files: throughput by coalescing, flush time, loop lag over time, cost of a call."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from report import results, settings

if TYPE_CHECKING:
    from collections.abc import Callable

OURS, OTHERS = "#2563eb", "#9ca3af"


def call_cost(found: dict[str, Any], axes: Any) -> None:
    """Bars: how many appends a call costs."""
    ratios = sorted(found["call_cost"]["series"]["ratios"].items(), key=lambda item: -item[1])
    names, values = [name for name, _ in ratios], [value for _, value in ratios]
    own = ("record_turn", "ensure_conversation", "resolve", "record_turn with a journal")
    bars = axes.barh(names, values, color=[OURS if name in own else OTHERS for name in names])
    axes.bar_label(bars, fmt="%.1f×", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(1, max(values) * 2.5)
    axes.set_xlabel("times one deque.append of a 5-tuple")
    axes.set_title("What a call costs")


def coalescing(found: dict[str, Any], axes: Any) -> None:
    """A line: calls a second by calls folded into a delta."""
    series = found["end_to_end"]["series"]["coalescing"]
    base = found["end_to_end"]["cases"]["one statement a call"]["median"]
    calls = [each["calls"] for each in series]
    axes.plot(calls, [each["calls/s"] for each in series], marker="o", color=OURS, label="tracker")
    axes.axhline(base, color=OTHERS, label="one statement a call, pool of 10")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(calls, [str(each) for each in calls])
    axes.set_xlabel("calls folded into one delta")
    axes.set_ylabel("calls a second, committed")
    axes.legend()
    axes.set_title("Throughput into Postgres")


def flush_time(found: dict[str, Any], axes: Any) -> None:
    """A line: milliseconds by deltas, beside proportional growth."""
    series = found["growth"]["series"]["flush"]
    sizes, taken = [each["deltas"] for each in series], [each["ms"] for each in series]
    axes.plot(sizes, taken, marker="o", color=OURS, label="flush")
    axes.plot(
        sizes, [taken[-1] * size / sizes[-1] for size in sizes], color=OTHERS, linestyle="--", label="proportional"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("deltas in the batch")
    axes.set_ylabel("milliseconds")
    axes.legend()
    axes.set_title("Time of a flush")


def loop_lag(found: dict[str, Any], axes: Any) -> None:
    """Points: how late the host's loop was, over the time of a drain and a flush."""
    for name, label, colour in (
        ("lag_with_300,000_objects", "host with 300,000 objects", "#f59e0b"),
        ("lag", "host with none", OURS),
    ):
        series = found["loop_lag"]["series"][name]
        axes.scatter([at for at, _ in series], [lag for _, lag in series], s=5, color=colour, label=label)
    axes.axhline(5, color=OTHERS, linestyle="--", label="goal for the longest")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("milliseconds since the drain began")
    axes.set_ylabel("lag of the host's loop, ms")
    axes.legend()
    axes.set_title("200,000 calls drained, 50,000 deltas flushed")


PICTURES: dict[str, tuple[str, Callable[[dict[str, Any], Any], None]]] = {
    "call_cost": ("call_cost", call_cost),
    "coalescing": ("end_to_end", coalescing),
    "flush_time": ("growth", flush_time),
    "loop_lag": ("loop_lag", loop_lag),
}


def main() -> None:
    """Draw what there is data for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a benchmark; all of them without")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    folder, found = given.results, results(given.results, given.names)
    for name, (source, draw) in PICTURES.items():
        if source not in found:
            continue
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        draw(found, axes)
        axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(settings({source: found[source]}), fontsize=5, color="#6b7280")
        for kind in ("png", "svg"):
            figure.savefig(folder / f"{name}.{kind}", dpi=120)
        plt.close(figure)
        print(f"{folder / name}.png")


if __name__ == "__main__":
    main()
