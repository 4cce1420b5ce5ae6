"""The dashboard's panels drawn from a Prometheus, without a Grafana: its own queries, in its own grid.

    python deploy/grafana/draw.py --prometheus http://127.0.0.1:9090 --minutes 10 --output dashboard.png

Needs matplotlib (extra `deploy`). What is read of the dashboard: titles, places, units, legends, stacking, thresholds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import matplotlib as mpl
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, MultipleLocator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

FILE: Final = Path(__file__).with_name("dashboard.json")
COLUMNS: Final = 24
LEAST_RATE: Final = 4
"""Scrapes in `$__rate_interval`, as Grafana has it."""

MOST_NAMES: Final = 7
"""In a legend."""

_PAGE, _CARD, _EDGE, _TEXT, _DIM = "#111217", "#181b1f", "#2c3235", "#d8d9da", "#8e9196"
_COLORS: Final = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#fade2a", "#96d98d")
_NAMED: Final = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}
_SECONDS: Final = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "µs", 1e6))
_BYTES: Final = ("B", "KiB", "MiB", "GiB", "TiB")


# -- the data ------------------------------------------------------------------------------------------


def fetch(url: str, start: float, end: float, scrape: float) -> dict[str, Any]:
    """Return what every query of the dashboard gives between two instants, with the dashboard itself.

    Args:
        url: of Prometheus.
        start: in seconds since 1970.
        end: the same.
        scrape: seconds between two scrapes.
    """
    board = json.loads(FILE.read_text(encoding="utf-8"))
    step = max(scrape, math.ceil((end - start) / 400))
    variables = {
        "$job": ".*",
        "$instance": ".*",
        "$__rate_interval": f"{max(step + scrape, LEAST_RATE * scrape):g}s",
        "$__range": f"{math.ceil(end - start)}s",
    }
    answers: dict[str, list[Any]] = {}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                query = target["expr"]
                for name, value in variables.items():
                    query = query.replace(name, value)
                found = client.post(
                    "/api/v1/query_range", data={"query": query, "start": start, "end": end, "step": step}
                )
                answer = found.json()
                if answer["status"] != "success":
                    raise SystemExit(f"{panel['title']}: {query}: {answer['error']}")
                answers[f"{panel['id']} {target['refId']}"] = answer["data"]["result"]
    return {"board": board, "answers": answers, "start": start, "end": end}


# -- numbers -------------------------------------------------------------------------------------------


def _short(value: float) -> str:
    for above, mark in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= above:
            return f"{value / above:.3g} {mark}"
    return f"{value:.3g}"


def shown(value: float, unit: str) -> str:
    """Return a number as a panel of this unit shows it."""
    if math.isnan(value):
        return "no data"
    if unit == "s":
        size, mark, factor = next(each for each in _SECONDS if abs(value) >= each[0] or not each[0])
        return f"{value:.3g} s" if size == 1.0 else f"{value * factor:.3g} {mark}" if value else "0 s"
    if unit == "bytes":
        power = min(int(math.log2(abs(value)) // 10), len(_BYTES) - 1) if abs(value) >= 1 else 0
        return f"{value / 1024**power:.3g} {_BYTES[power]}"
    if unit == "percentunit":
        return f"{value:.3g}".rstrip() if value > 100 else f"{value * 100:.3g}%"
    suffix = {"cps": " c/s", "ops": " ops/s", "reqps": " req/s"}.get(unit, "")
    return f"{_short(value)}{suffix}"


def _legend(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), text)


# -- the picture ---------------------------------------------------------------------------------------


def _ticks(unit: str, highest: float) -> Locator:
    """Return where the lines of the grid are: of bytes at whole multiples of a power of two."""
    if unit == "bytes" and highest >= 1:
        return MultipleLocator(2.0 ** math.ceil(math.log2(highest * 1.12 / 6)))
    return MaxNLocator(5, integer=unit == "short" and highest >= 4)


class Picture:
    """Draws a dashboard.

    Args:
        data: what `fetch` returned.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self._panels = data["board"]["panels"]
        self._rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in self._panels)
        self._head = 3.0
        self._figure = Figure(figsize=(16, (self._rows + self._head) * 0.37), dpi=100, facecolor=_PAGE)

    def save(self, path: Path) -> None:
        """Draw all of it into *path*."""
        begun, ended = (datetime.fromtimestamp(self._data[each], UTC) for each in ("start", "end"))
        title = self._data["board"]["title"]
        self._write(0.3, -self._head + 1.1, title, size=15, weight="bold")
        self._write(0.3, -self._head + 2.2, f"{begun:%Y-%m-%d %H:%M:%S} to {ended:%H:%M:%S} UTC", size=9, color=_DIM)
        for panel in self._panels:
            if panel["type"] == "row":
                self._write(0.3, panel["gridPos"]["y"] + 0.7, f"▾ {panel['title']}", size=11, weight="bold")
            else:
                self._panel(panel)
        self._figure.savefig(path, facecolor=_PAGE)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        return x / COLUMNS, 1 - (y + self._head) / (self._rows + self._head)

    def _write(self, x: float, y: float, text: str, **style: Any) -> None:
        self._figure.text(*self._place(x, y), text, **{"color": _TEXT, "va": "center", **style})

    def _panel(self, panel: dict[str, Any]) -> None:
        grid = panel["gridPos"]
        left, top = self._place(grid["x"] + 0.08, grid["y"] + 0.12)
        right, bottom = self._place(grid["x"] + grid["w"] - 0.08, grid["y"] + grid["h"] - 0.12)
        card = FancyBboxPatch(
            (left, bottom),
            right - left,
            top - bottom,
            boxstyle="round,pad=0,rounding_size=0.002",
            facecolor=_CARD,
            edgecolor=_EDGE,
            linewidth=0.8,
            transform=self._figure.transFigure,
            zorder=-1,
        )
        self._figure.add_artist(card)
        self._write(grid["x"] + 0.25, grid["y"] + 0.65, panel["title"], size=9.5)
        if panel["type"] == "stat":
            self._stat(panel)
        else:
            self._chart(panel)

    def _axes(self, grid: dict[str, int], left: float, right: float, above: float, below: float) -> Axes:
        x0, y1 = self._place(grid["x"] + left, grid["y"] + above)
        x1, y0 = self._place(grid["x"] + grid["w"] - right, grid["y"] + grid["h"] - below)
        axes = self._figure.add_axes((x0, y0, x1 - x0, y1 - y0), facecolor="none")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(colors=_DIM, labelsize=7.5, length=0)
        start, end = (date2num(datetime.fromtimestamp(self._data[each], UTC)) for each in ("start", "end"))
        axes.set_xlim(start, end)
        return axes

    def _series(self, panel: dict[str, Any]) -> Iterable[tuple[str, list[float], list[float]]]:
        for target in panel["targets"]:
            for series in self._data["answers"][f"{panel['id']} {target['refId']}"]:
                name = _legend(target["legendFormat"], series["metric"])
                times = [float(date2num(datetime.fromtimestamp(at, UTC))) for at, _ in series["values"]]
                yield name, times, [float(value) for _, value in series["values"]]

    def _stat(self, panel: dict[str, Any]) -> None:
        grid, defaults = panel["gridPos"], panel["fieldConfig"]["defaults"]
        found = list(self._series(panel))
        values = [value for _, _, each in found for value in each if not math.isnan(value)]
        last = values[-1] if values else math.nan
        color = _NAMED["green"]
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is None or last >= step["value"]:
                color = _NAMED[step["color"]]
        self._write(
            grid["x"] + grid["w"] / 2,
            grid["y"] + 1.85,
            shown(last, defaults["unit"]),
            size=18,
            ha="center",
            color=color,
        )
        axes = self._axes(grid, 0.08, 0.08, 2.6, 0.14)
        axes.axis("off")
        for _, times, numbers in found:
            axes.plot(times, numbers, color=color, linewidth=0.9)
            axes.fill_between(times, numbers, color=color, alpha=0.15, linewidth=0)
        axes.set_ylim(0, max([*values, 0]) * 1.1 or 1)

    def _chart(self, panel: dict[str, Any]) -> None:
        grid, defaults = panel["gridPos"], panel["fieldConfig"]["defaults"]
        axes = self._axes(grid, 1.15, 0.3, 1.3, 1.95)
        stacked = "stacking" in defaults["custom"]
        opacity = defaults["custom"]["fillOpacity"] / 100
        below: dict[float, float] = {}
        highest, drawn, still = 0.0, [], 0
        found = list(self._series(panel))
        for name, times, values in found:
            # What would be scrolled there: a long legend names what moved.
            moved = len(found) <= MOST_NAMES or any(values)
            color = _COLORS[len(drawn) % len(_COLORS)] if moved else _DIM
            floor = [below.get(at, 0.0) for at in times] if stacked else [0.0] * len(times)
            top = [low + value for low, value in zip(floor, values, strict=True)]
            below |= dict(zip(times, top, strict=True)) if stacked else {}
            axes.plot(times, top, color=color, linewidth=1.1, label=name if moved else "_", zorder=2 + moved)
            axes.fill_between(times, floor, top, color=color, alpha=opacity, linewidth=0)
            highest = max([highest, *(value for value in top if not math.isnan(value))])
            drawn += [name] * moved
            still += not moved
        if still:
            drawn.append(f"{still} more, at 0" if drawn else f"all {still} at 0")
            axes.plot([], [], color=_DIM, linewidth=1.1, label=drawn[-1])
        axes.set_ylim(0, highest * 1.12 or 1)
        axes.yaxis.set_major_locator(_ticks(defaults["unit"], highest))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, defaults["unit"])))
        axes.grid(color=_EDGE, linewidth=0.6)
        locator = AutoDateLocator(minticks=3, maxticks=6)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
        if not drawn:
            axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", va="center", color=_DIM, size=9)
            return
        axes.legend(
            loc="upper left",
            bbox_to_anchor=self._place(grid["x"] + 0.25, grid["y"] + grid["h"] - 1.25),
            bbox_transform=self._figure.transFigure,
            ncols=max(1, min(len(drawn), int(grid["w"] * 11 / (max(map(len, drawn)) + 5)))),
            frameon=False,
            fontsize=6.8,
            labelcolor=_TEXT,
            handlelength=1.1,
            handletextpad=0.5,
            columnspacing=1.0,
            labelspacing=0.25,
            borderaxespad=0,
        )


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw what `fetch` returned into *path*."""
    with mpl.rc_context({"font.family": "sans-serif", "timezone": "UTC"}):
        Picture(data).save(path)


def main() -> None:
    """Draw from a Prometheus, or from what `demo_run.py --data` kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=60.0, help="until now")
    parser.add_argument("--scrape", type=float, default=15.0, help="seconds between two scrapes")
    parser.add_argument("--data", type=Path, help="a file that demo_run.py kept, in Prometheus' place")
    parser.add_argument("--output", type=Path, default=Path("dashboard.png"))
    options = parser.parse_args()
    if options.data is not None:
        data = json.loads(options.data.read_text(encoding="utf-8"))
    else:
        now = time.time()
        data = fetch(options.prometheus, now - options.minutes * 60, now, options.scrape)
    draw(data, options.output)


if __name__ == "__main__":
    main()
