"""The status page in a real browser, served under the strict policy that the daemon serves it with."""

from __future__ import annotations

import json
import threading
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias
from urllib.parse import parse_qs, urlsplit

import pytest

import tracker_daemon.daemon
from tests.daemon.chromium import CHROMIUM, Chromium
from tracker_daemon.books import Books
from tracker_daemon.daemon.history import History
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.readings import Reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.daemon.chromium import Tab

FILES = Path(tracker_daemon.daemon.__file__).parent / "page"
POLICY = "default-src 'self'; style-src 'self'; script-src 'self'"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NOW = 1_700_000_000.0
Runs: TypeAlias = "list[list[tuple[float, float]]]"
NASTY = "</dd><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>&lt;b&gt; \u202eevil \x07"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")


class Daemon:
    """A daemon as the page sees it: the files, a history that grows when the test says so, a status to change.

    Attributes:
        status: what status.json says beside the history, the totals and `now`.
        broken: answered in place of status.json: HTTP status and body.
        asked: the `since` of each question, `None` without.
    """

    def __init__(self) -> None:
        self.seconds, self.accepted, self.applied = 0, 0, 0
        self.numbers, self.history = FlushNumbers(), History()
        self.broken: tuple[int, bytes] | None = None
        self.asked: list[float | None] = []
        self._lock = threading.Lock()
        self._port = 0
        self.status: dict[str, Any] = {
            "version": "9.8.7",
            "started_at": NOW - 93_784,
            "state": "ready",
            "reason": None,
            "queue_limit": 2_000,
            "ledger": {
                "producer": "5f0c1c1e-7a58-4b59-9a3e-0f3f8f2f7f10",
                "epoch": 7,
                "sequence": 1_122_480,
                "relayed": 8_192,
                "regressions": 0,
                "fenced": False,
            },
            "journal": {"directory": "/var/lib/journal", "bytes": 13_421_773, "segments": 2, "degraded": False},
            "clients": 9,
            "errors": [],
            "stream": None,
            "config": {
                "flush_interval": 0.25,
                "max_pending": 2_000,
                "listen": ["unix:/run/s", "127.0.0.1:1"],
                "token": None,
            },
        }
        self.second(0, 0)

    def second(self, accepted: int, applied: int, threads: int = 0, latencies: Sequence[float] = ()) -> None:
        """Let a second pass in which so many calls came and went, so many threads wait, and flushes took so long."""
        with self._lock:
            self.accepted, self.applied = self.accepted + accepted, self.applied + applied
            for each in latencies:
                self.numbers.flush_seconds.observe(each)
                self.numbers.commit_lag_seconds.observe(each * 10)
            pending = self.accepted - self.applied
            books = Books({"record_turn": self.accepted}, {"record_turn": self.applied}, {}, {}, pending, threads, 0, 0)
            reading = Reading(books, {}, self.numbers, 2_000)
            self.history.add(reading, at=NOW + self.seconds, monotonic=float(self.seconds))
            self.seconds += 1

    def restart(self) -> None:
        """Begin another life, with nothing of the one before."""
        with self._lock:
            self.accepted = self.applied = 0
            self.numbers, self.history = FlushNumbers(), History()

    @property
    def now(self) -> float:
        """Seconds since 1970 of the last reading."""
        return NOW + self.seconds - 1

    def answer(self, since: float | None) -> dict[str, Any]:
        """Return what status.json says."""
        with self._lock:
            self.asked.append(since)
            totals = {
                "accepted": self.accepted,
                "applied": self.applied,
                "dead_lettered": 0,
                "lost": 0,
                "rejected": 0,
                "pending": self.accepted - self.applied,
            }
            return {"now": self.now, "history": self.history.columns(since), "totals": totals} | deepcopy(self.status)

    @property
    def url(self) -> str:
        """Where the page is; the same after the server was away."""
        return f"http://127.0.0.1:{self._port}/"

    def start(self) -> None:
        """Serve."""
        handler = type("Handler", (_Handler,), {"daemon": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        """Be away: connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    daemon: ClassVar[Daemon]

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        file = FILES / ("index.html" if parts.path == "/" else parts.path.removeprefix("/page/"))
        if parts.path == "/status.json" and self.daemon.broken:
            self._send(self.daemon.broken[0], "application/json", self.daemon.broken[1])
        elif parts.path == "/status.json":
            since = parse_qs(parts.query).get("since")
            answer = self.daemon.answer(float(since[0]) if since else None)
            self._send(200, "application/json", json.dumps(answer, allow_nan=False).encode())
        elif parts.path == "/" or (parts.path.startswith("/page/") and file.is_file()):
            self._send(200, TYPES[file.suffix], file.read_bytes())
        else:
            self._send(404, "text/plain", b"")

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One browser for the tests of this file."""
    with Chromium() as browser:
        yield browser


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon that is up since a minute."""
    daemon = Daemon()
    for number in range(1, 61):
        # 2 ms in the even seconds, nothing in the odd ones, which leaves points alone; then a stretch of 5 seconds.
        latencies = (0.002, 0.002) if number % 2 == 0 or number > 55 else ()
        daemon.second(10 * number, 10 * number - (5 if number > 50 else 0), number, latencies)
    daemon.start()
    yield daemon
    daemon.stop()


def opened(tab: Tab, daemon: Daemon) -> None:
    """Open the page and wait for the first answer."""
    tab.open(daemon.url)
    tab.wait("document.querySelector('#state').dataset.state === 'ready'")


def shown(tab: Tab, daemon: Daemon) -> None:
    """Wait until the page shows what the daemon has counted."""
    tab.wait(f"document.querySelector('#accepted').textContent === '{daemon.accepted:,}'")


def line(daemon: Daemon, column: str, top: float) -> Runs:
    """Return the stretches that a column must be drawn as, with *top* at the axis's end."""
    columns: dict[str, Any] = dict(daemon.history.columns())
    end = columns["at"][-1]
    runs: Runs = [[]]
    for at, value in zip(columns["at"], columns[column], strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((300 - (end - at), 100 * (1 - value / top)))
    return [run for run in runs if run]


def same(found: Runs, expected: Runs) -> bool:
    """Tell whether two lines are one, to the two decimals that are drawn."""
    return [len(run) for run in found] == [len(run) for run in expected] and all(
        point == pytest.approx(other, abs=0.0051)
        for run, others in zip(found, expected, strict=True)
        for point, other in zip(run, others, strict=True)
    )


def drawn(tab: Tab, name: str) -> Runs:
    """Return the stretches of a line; a point alone must be a line of no length, which is drawn as a dot."""
    path = tab.evaluate(f"document.getElementById('{name}').getAttribute('d')")
    runs = [[point.split() for point in run.split("L")] for run in path.split("M")[1:]]
    assert all((len(run) == 1) == run[-1][-1].endswith("h0") for run in runs)
    return [[(float(x), float(y.removesuffix("h0"))) for x, y in run] for run in runs]


def facts(tab: Tab, selector: str) -> dict[str, str]:
    """Return a list of names and values as shown."""
    pairs = f"[...document.querySelectorAll('{selector} > div')].map(d => [d.children[0].innerText, d.children[1].innerText])"
    return dict(tab.evaluate(pairs))


@needs_chromium
def test_charts_are_the_samples(browser: Chromium, daemon: Daemon) -> None:
    """Every line runs through the samples, its axis ends at a round number, gaps stay gaps; new seconds are added."""
    with browser.tab() as tab:
        opened(tab, daemon)
        for _ in range(2):
            shown(tab, daemon)
            # 600 and, after the second round, 610 calls a second: the axis goes from 600 to 800.
            top = 600 if daemon.seconds == 61 else 800
            assert same(drawn(tab, "rates-line-0"), line(daemon, "accepted", top))
            assert same(drawn(tab, "rates-line-1"), line(daemon, "applied", top))
            assert same(drawn(tab, "queue-line-0"), line(daemon, "queue_calls", 60 if top == 600 else 80))
            assert same(drawn(tab, "queue-line-1"), line(daemon, "queue_threads", 60 if top == 600 else 80))
            assert same(drawn(tab, "flush-line-0"), line(daemon, "flush_p99", 0.003))
            assert same(drawn(tab, "flush-line-1"), line(daemon, "flush_p50", 0.003))
            assert same(drawn(tab, "lag-line-0"), line(daemon, "commit_lag_p99", 0.03))
            assert len(drawn(tab, "flush-line-0")) == 28
            daemon.second(610, 600, 62, (0.002,))
        axis = "[...document.querySelectorAll('#{} .axis span')].map(s => s.textContent)"
        assert tab.evaluate(axis.format("rates")) == ["800", "400", "0"]
        assert tab.evaluate(axis.format("flush")) == ["3 ms", "1.5 ms", "0"]
        assert tab.text("#rates-accepted") == "610"
        assert tab.text("#rates-applied") == "600"
        assert tab.text("#flush-p50") == "1.8 ms"
        assert tab.text("#lag-p99") == "25 ms"
        assert "3.1 % of 2,000" in tab.text("#queue")
        assert daemon.asked[0] is None
        assert daemon.asked[-1] is not None
        assert tab.faults() == []


@needs_chromium
def test_numbers_and_states(browser: Chromium, daemon: Daemon) -> None:
    """Counts are grouped, bytes and spans have units; every state has its words, and trouble its colour."""
    with browser.tab() as tab:
        opened(tab, daemon)
        assert tab.evaluate("document.title") == "Ready \u00b7 tracker_daemon"
        assert tab.text("h1").split() == ["tracker_daemon", "9.8.7"]
        assert "9 clients" in tab.text("#life")
        assert "up 1 d 2 h" in tab.text("#life")
        assert facts(tab, "#identity")["accepted"] == "18,300"
        assert facts(tab, "#identity")["pending"] == "50"
        assert tab.text("#verdict") == "adds up"
        assert facts(tab, "#ledger") == {
            "producer": "5f0c1c1e-7a58-4b59-9a3e-0f3f8f2f7f10",
            "epoch": "7",
            "sequence": "1,122,480",
            "clients' batches": "8,192",
            "regressions": "0",
            "fenced": "no",
        }
        assert facts(tab, "#journal")["size"] == "12.8 MiB"
        assert facts(tab, "#config") == {
            "flush_interval": "0.25",
            "max_pending": "2,000",
            "listen": "unix:/run/s\n127.0.0.1:1",
            "token": "unset",
        }
        assert tab.text("#errors") == "None."

        daemon.status |= {
            "state": "draining",
            "reason": "stopping: 50 calls are pending",
            "journal": None,
            "clients": 1,
        }
        daemon.status["ledger"] |= {"fenced": True, "regressions": 1}
        totals = {"accepted": 10**15, "applied": 10**15 - 8, "dead_lettered": 3, "lost": 2, "rejected": 1, "pending": 1}
        daemon.status["totals"] = totals
        tab.wait("document.querySelector('#state').dataset.state === 'draining'")
        assert tab.text("#state") == "Draining"
        assert tab.text("#reason") == "stopping: 50 calls are pending"
        assert facts(tab, "#journal")["journal"].startswith("none")
        assert facts(tab, "#ledger")["fenced"].startswith("yes")
        assert "1 client\n" in tab.text("#life") + "\n"
        assert facts(tab, "#identity")["accepted"] == "1,000,000,000,000,000"
        assert tab.text("#verdict") == "does not add up: 2"
        levels = "['dead_lettered', 'lost', 'rejected', 'verdict'].map(id => document.getElementById(id).dataset.level)"
        assert tab.evaluate(levels) == ["warn", "bad", "warn", "bad"]

        daemon.status |= {"state": "not_ready", "reason": "the database does not answer"}
        tab.wait("document.title === 'Not ready \u00b7 tracker_daemon'")
        assert tab.text("#reason") == "the database does not answer"
        assert tab.faults() == []


@needs_chromium
def test_a_consumer_shows_its_partitions(browser: Chromium, daemon: Daemon) -> None:
    """Of a stream's consumer it shows where each partition stands, and why one does not go on, in the ledger's place."""
    with browser.tab() as tab:
        opened(tab, daemon)
        visible = "['stream-card', 'producer-cards'].map((id) => document.getElementById(id).offsetHeight > 0)"
        assert tab.evaluate(visible) == [False, True]
        mine = {"partition": 0, "owned": True, "position": 41, "lag": 7, "bytes": 1 << 20, "max_bytes": 1 << 30}
        others = {"partition": 1, "owned": False, "position": 0, "lag": 0, "bytes": 0, "max_bytes": 0, "fault": ""}
        daemon.status["stream"] = [{**mine, "fault": NASTY}, others]
        tab.wait("document.querySelectorAll('#stream > div').length === 2")
        assert tab.evaluate(visible) == [True, False]
        found = facts(tab, "#stream")
        assert found["partition 0"].startswith("applied 41, 7 behind, 1.0 MiB of 1.0 GiB: </dd><script>")
        assert found["partition 1"].startswith("read by another")
        assert not tab.evaluate("'ran' in window")


@needs_chromium
def test_what_comes_from_outside_is_text(browser: Chromium, daemon: Daemon) -> None:
    """Markup in an error, its class, a reason, a name or a value is shown letter by letter and never run."""
    daemon.status["errors"] = [{"at": NOW + 50, "class": NASTY, "text": NASTY}]
    daemon.status |= {"reason": NASTY, "version": NASTY, "config": {NASTY: NASTY, "list": [NASTY]}}
    daemon.status["ledger"] |= {"producer": NASTY}
    daemon.status["journal"] |= {"directory": NASTY}
    with browser.tab() as tab:
        opened(tab, daemon)
        daemon.status |= {"state": NASTY}
        tab.wait("document.querySelector('#state').textContent.includes('script')")
        for selector in (
            "#state",
            "#reason",
            "#version",
            "#errors .class",
            "#errors .text",
            "#config dt",
            "#config dd",
        ):
            assert tab.evaluate(f"document.querySelector('{selector}').textContent") == NASTY
        assert tab.evaluate("document.querySelectorAll('main script, main img, header script, b').length") == 0
        assert tab.evaluate("typeof window.ran") == "undefined"
        assert tab.faults() == []


@needs_chromium
def test_equal_errors_are_one(browser: Chromium, daemon: Daemon) -> None:
    """An outage of a minute is a line a kind, with count and age, and what came before is still in sight."""
    refused = [{"at": daemon.now - number, "class": "connection", "text": "refused"} for number in range(20)]
    probed = [each | {"text": "asking: refused"} for each in refused]
    both = [each for pair in zip(refused, probed, strict=True) for each in pair]
    daemon.status["errors"] = [*both, {"at": NOW - 4_000, "class": "lock", "text": "deadlock"}]
    with browser.tab() as tab:
        opened(tab, daemon)
        rows = tab.evaluate("[...document.querySelectorAll('#errors li')].map(li => li.innerText)")
        assert len(rows) == 3
        for row in rows[:2]:
            assert "0 s ago" in row
            assert "20 times since" in row
        assert "1 h 7 min ago" in rows[2]
        assert "times" not in rows[2]


@needs_chromium
def test_sparse_traffic(browser: Chromium, daemon: Daemon) -> None:
    """Seconds without a flush leave the newest figure there is, with its age, and a lone one is a dot to be seen."""
    with browser.tab() as tab:
        for _ in range(7):
            daemon.second(0, 0)
        opened(tab, daemon)
        assert tab.text("#flush-p50") == "1.8 ms"
        assert tab.text("#flush .note").startswith("7 s ago, max 2")
        assert tab.text("#rates .note") == "max 600"
        dots = tab.evaluate("document.querySelector('#flush .alone.line-0').getAttribute('d')")
        assert dots.count("M") == sum(len(run) == 1 for run in drawn(tab, "flush-line-0")) == 27
        assert tab.evaluate("parseFloat(getComputedStyle(document.querySelector('#flush .alone')).strokeWidth)") >= 4
        # A moment that is chosen shows itself, and no other one.
        tab.press("Tab", "ArrowLeft")
        assert tab.text("#flush-p50") == "\u2013"
        assert tab.faults() == []


@needs_chromium
def test_two_lines_that_are_one_are_both_seen(browser: Chromium, daemon: Daemon) -> None:
    """The second line lies on the first and is thinner; the producer's name is on one line."""
    with browser.tab() as tab:
        opened(tab, daemon)
        order = "[...document.querySelectorAll('#rates .line')].map(l => [l.id, parseFloat(getComputedStyle(l).strokeWidth)])"
        (below, wide), (above, thin) = tab.evaluate(order)
        assert (below, above) == ("rates-line-0", "rates-line-1")
        assert wide >= 2 * thin
        name = "document.querySelector('#ledger dd')"
        assert tab.evaluate(f"{name}.getClientRects().length === 1 && {name}.scrollWidth <= {name}.clientWidth")
        assert tab.evaluate(f"{name}.offsetHeight") < 30


@needs_chromium
def test_keyboard_and_pointer_read_a_moment(browser: Chromium, daemon: Daemon) -> None:
    """Tab reaches a chart, arrows move through its samples in all charts at once, Escape goes back to now."""
    with browser.tab() as tab:
        opened(tab, daemon)
        tab.press("Tab")
        assert tab.evaluate("document.activeElement.id") == "rates-plot"
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert "accepted 600, applied 595" in tab.evaluate("document.activeElement.ariaValueText")
        tab.press("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowRight")
        assert "accepted 580, applied 575" in tab.evaluate("document.activeElement.ariaValueText")
        assert tab.evaluate("document.activeElement.ariaValueNow") == "-2"
        assert [tab.text(f"#{name}") for name in ("rates-accepted", "rates-applied", "queue-threads")] == [
            "580",
            "575",
            "58",
        ]
        assert tab.text("#lag .when").endswith("2 s ago")
        assert (
            tab.evaluate("[...document.querySelectorAll('.hair')].map(path => path.getAttribute('d'))")
            == ["M298.00 0V100"] * 4
        )
        # What is read stays while time goes on.
        daemon.second(1, 1)
        shown(tab, daemon)
        assert tab.text("#rates-accepted") == "580"
        assert tab.text("#rates .when").endswith("3 s ago")
        tab.press("Home")
        assert tab.text("#rates-accepted") == "10.0"
        tab.press("ArrowLeft", "PageUp")
        assert tab.text("#rates-accepted") == "310"
        tab.press("Escape")
        assert tab.text("#rates-accepted") == "1.0"
        assert tab.text("#rates .when") == "now"

        box = tab.evaluate("document.querySelector('#queue-plot').getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] * (1 - 10 / 300), box["y"] + box["height"] / 2
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        tab.wait("document.querySelector('#queue .when').textContent.endsWith('10 s ago')")
        assert tab.text("#rates-accepted") == "510"
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        tab.wait("document.querySelector('#queue .when').textContent === 'now'")
        assert tab.faults() == []


@needs_chromium
def test_charts_in_words(browser: Chromium, daemon: Daemon) -> None:
    """Each chart has a name and a description for who cannot see it, and all have a table."""
    with browser.tab() as tab:
        opened(tab, daemon)
        tree = tab.call("Accessibility.getFullAXTree")["nodes"]
        sliders = [node for node in tree if node.get("role", {}).get("value") == "slider"]
        assert [node["name"]["value"] for node in sliders] == [
            "Calls per second",
            "Queue not yet committed",
            "Flush latency begin to commit",
            "Commit lag oldest call to commit",
        ]
        assert "accepted: now 600, from 10.0 to 600; applied: now 595," in sliders[0]["description"]["value"]
        tab.evaluate("document.querySelector('#table summary').focus()")
        tab.press("Enter")
        tab.wait("document.querySelectorAll('#table tbody tr').length === 2")
        cells = (
            "[...document.querySelectorAll('#table tbody tr')].map(r => [...r.cells].slice(1).map(c => c.innerText))"
        )
        assert tab.evaluate(cells) == [
            ["600", "595", "50", "60", "2.5 ms", "1.8 ms", "25 ms"],
            ["300", "300", "0", "30", "2.5 ms", "1.8 ms", "25 ms"],
        ]


@needs_chromium
@pytest.mark.parametrize("width", [320, 360, 761, 1100, 1280])
def test_no_width_scrolls_sideways(browser: Chromium, daemon: Daemon, width: int) -> None:
    """On a phone and on a desk, with words of any length, nothing stands out of the page."""
    long = "x" * 300
    daemon.status["errors"] = [{"at": NOW, "class": long, "text": long}]
    daemon.status |= {"reason": long, "config": {long: long, "short": long}}
    daemon.status["journal"] |= {"directory": "/" + long}
    with browser.tab(width=width, height=740) as tab:
        opened(tab, daemon)
        daemon.status |= {"state": "not_ready", "totals": dict.fromkeys(facts(tab, "#identity"), 10**12)}
        daemon.status["totals"] |= {"dead_lettered": 10**12, "rejected": 10**12}
        tab.wait("document.querySelector('#state').dataset.state === 'not_ready'")
        tab.evaluate("document.querySelector('#table').open = true")
        tab.wait("document.querySelectorAll('#table tbody tr').length")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        outside = "[...document.querySelectorAll('body *:not(.hint, svg *)')].filter(e => e.getBoundingClientRect().right > innerWidth + .5).map(e => e.outerHTML.slice(0, 90))"
        assert tab.evaluate(outside) == []


CONTRASTS = """
(() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = parts(color).slice(0, 3).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((parts(color)[3] ?? 1) === 1) return color;
    }
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility({visibilityProperty: true}) || node.closest("noscript")) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.id || node.className || node.tagName, node.textContent.slice(0, 30)]);
  }
  return found;
})()
"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_readable(browser: Chromium, daemon: Daemon, scheme: str) -> None:
    """The page follows the system's scheme, and all text in any state has the contrast of WCAG AA."""
    daemon.status["errors"] = [{"at": NOW, "class": "lock", "text": "deadlock"}]
    with browser.tab(prefers_color_scheme=scheme, prefers_reduced_motion="reduce") as tab:
        opened(tab, daemon)
        red, green, blue = tab.evaluate(
            "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert (red + green + blue < 120) == (scheme == "dark")
        states: list[tuple[str, str | None]] = [("ready", None), ("draining", "stopping"), ("not_ready", "away")]
        for state, reason in states:
            daemon.status |= {"state": state, "reason": reason}
            daemon.status["totals"] = {
                "accepted": 9, "applied": 3, "dead_lettered": 1, "lost": 1, "rejected": 1, "pending": 2 + len(state),
            }  # fmt: skip
            tab.wait(f"document.querySelector('#state').dataset.state === '{state}'")
            found = tab.evaluate(CONTRASTS)
            assert len(found) > 80
            assert [each for each in found if each[0] < 4.5] == []


@needs_chromium
def test_the_page_goes_on_when_the_daemon_was_away(browser: Chromium, daemon: Daemon) -> None:
    """Without an answer it says so and keeps what it knew; then it asks for what it missed, of the same life."""
    with browser.tab() as tab:
        opened(tab, daemon)
        before = drawn(tab, "rates-line-0")
        daemon.stop()
        try:
            tab.wait("/^No answer for [0-9]+ s/.test(document.querySelector('#silence').textContent)")
            assert not tab.evaluate("document.querySelector('#silence').hidden")
            assert "(not reachable)" in tab.text("#silence")
            assert tab.text("#state") == "No answer"
            assert tab.evaluate("document.title").startswith("No answer")
            assert drawn(tab, "rates-line-0") == before
            tab.wait("/^No answer for ([2-9]|[0-9]{2,}) s/.test(document.querySelector('#silence').textContent)")
            known, asked = daemon.now, len(daemon.asked)
            daemon.second(700, 700)
            daemon.second(800, 800)
        finally:
            daemon.start()
        tab.wait("document.querySelector('#state').dataset.state === 'ready'")
        assert tab.evaluate("document.querySelector('#silence').hidden")
        assert daemon.asked[asked] == known
        assert same(drawn(tab, "rates-line-0"), line(daemon, "accepted", 800))
        # Refused connections are the browser's to report; nothing else may have gone wrong.
        assert [fault for fault in tab.faults() if "ERR_" not in fault] == []


@needs_chromium
def test_another_life_replaces_the_charts(browser: Chromium, daemon: Daemon) -> None:
    """After a restart the charts show the new daemon alone, since the samples before are not its own."""
    with browser.tab() as tab:
        opened(tab, daemon)
        daemon.restart()
        daemon.second(0, 0)
        for number in range(3):
            daemon.second(30 + number, 20)
        shown(tab, daemon)
        assert same(drawn(tab, "rates-line-0"), line(daemon, "accepted", 40))
        assert tab.faults() == []


@needs_chromium
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ((503, b"{}"), "(HTTP 503)"),
        ((200, b"<html>"), "(not understood: "),
        ((200, b"{}"), "(not understood: "),
        ((200, b'{"history": {"since": null, "at": [1]}}'), "(not understood: no column"),
    ],
)
def test_answers_that_are_none(browser: Chromium, daemon: Daemon, broken: tuple[int, bytes], says: str) -> None:
    """A proxy's error page, or a document of another shape, is said to be one; the page goes on by itself."""
    with browser.tab() as tab:
        opened(tab, daemon)
        daemon.broken = broken
        tab.wait(f"document.querySelector('#silence').textContent.includes({json.dumps(says)})")
        daemon.broken = None
        tab.wait("document.querySelector('#state').dataset.state === 'ready'")
        assert tab.evaluate("document.querySelector('#silence').hidden")


# Timers that wait and questions under way, to know that the page is idle.
COUNTED = """
window.timers = new Set(); window.underway = 0;
const [set, clear, get] = [setTimeout, clearTimeout, fetch];
window.setTimeout = (f, ms) => { const id = set(() => { timers.delete(id); f(); }, ms); timers.add(id); return id; };
window.clearTimeout = (id) => { timers.delete(id); clear(id); };
window.fetch = (...all) => { underway++; if (window.hides) turn(true); return get(...all).finally(() => underway--); };
window.turn = (hidden) => {
  Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
  return true;
};
"""


@needs_chromium
def test_a_hidden_page_asks_nothing(browser: Chromium, daemon: Daemon) -> None:
    """While hidden no question waits to be asked; shown again it asks at once, for what it missed."""
    with browser.tab() as tab:
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=COUNTED)
        opened(tab, daemon)
        # Between two questions one timer waits for the next.
        idle = "new Promise((done) => { (function look() { if (timers.size === 1 && !underway) { turn(true); done(timers.size); } else requestAnimationFrame(look); })(); })"
        assert tab.evaluate(idle) == 0
        asked, known = len(daemon.asked), daemon.now
        daemon.second(640, 640)
        assert tab.text("#accepted") == "18,300"
        tab.evaluate("turn(false)")
        shown(tab, daemon)
        assert daemon.asked[asked] == known
        assert not tab.evaluate("document.documentElement.classList.contains('silent')")
        # Hidden while a question is under way: its answer is taken, and no other question follows.
        assert tab.evaluate(idle) == 0
        daemon.second(650, 650)
        tab.evaluate("window.hides = true, turn(false)")
        shown(tab, daemon)
        assert tab.evaluate("document.hidden && timers.size") == 0
        daemon.second(660, 660)
        tab.evaluate("window.hides = false, turn(false)")
        shown(tab, daemon)
        assert tab.faults() == []


def test_files_need_nothing_from_elsewhere() -> None:
    """No address of another host, no inline script or style, and no way for text to become markup."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in FILES.iterdir()}
    assert set(texts) == {"index.html", "page.css", "page.js", "charts.js", "text.js", "icon.svg"}
    for name, text in texts.items():
        assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", "").replace("//\n", ""), name
    assert not any(
        word in texts["page.js"] for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", ".write(")
    )
    assert not any(word in texts["index.html"] for word in ("style=", "<style", "onclick", "<script>"))
