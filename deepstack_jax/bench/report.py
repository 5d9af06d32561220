"""What a load says of a server: percentiles, a table and histograms.

The definitions are those of aiperf and of vLLM's `bench serve`, which name one of them differently:

- TTFT: from sending a request to its first event with content; role-only and empty events don't count.
- ITL: the time between two events with content of one request, over all requests (vLLM's ITL, aiperf's inter chunk
  latency). An event may carry several tokens.
- TPOT: of one request, the time from its first to its last event with content, divided by its tokens less one (vLLM's
  TPOT, aiperf's inter token latency). Requests of one event have none.
- E2E: from sending a request to its last event with content.
- Throughputs: over the time from the first request's start to the last one's end.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import batched
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from deepstack_jax.bench.load import RequestRecord, explain

PERCENTILES = (50, 90, 95, 99)
TITLES = {
    "ttft_ms": "time to first token",
    "itl_ms": "inter-token latency",
    "tpot_ms": "time per output token",
    "e2e_ms": "end-to-end latency",
}
BLOCKS = " ▁▂▃▄▅▆▇█"


def samples(records: Sequence[RequestRecord]) -> dict[str, np.ndarray]:
    """Milliseconds of all successful requests, by the keys of `TITLES`."""
    found: dict[str, list[float]] = {name: [] for name in TITLES}
    for record in records:
        times = record.content_times
        if record.error or not times:
            continue
        found["ttft_ms"].append(times[0] - record.sent)
        found["itl_ms"] += np.diff(times).tolist()
        if len(times) > 1 and record.tokens > 1:
            found["tpot_ms"].append((times[-1] - times[0]) / (record.tokens - 1))
        found["e2e_ms"].append(times[-1] - record.sent)
    return {name: 1e3 * np.asarray(values) for name, values in found.items()}


def statistics(values: np.ndarray) -> dict[str, float] | None:
    """Mean, percentiles (between two values, in proportion), min and max; None without values."""
    if not values.size:
        return None
    percentiles = {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    return {"mean": float(values.mean()), **percentiles, "min": float(values.min()), "max": float(values.max())}


def summary(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """The figures of a load as one JSON object. Tokens and throughputs are those of the successful requests."""
    good = [record for record in records if not record.error]
    duration = max(record.ended for record in records) - min(record.sent for record in records)
    tokens = sum(record.tokens for record in good)
    errors = Counter((record.status, explain(record)) for record in records if record.error)
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "duration_s": duration,
        "requests_per_s": len(good) / duration,
        "output_tokens_per_s": tokens / duration,
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in good),
        "cached_prompt_tokens": sum(record.cached_tokens or 0 for record in good),
        "output_tokens": tokens,
        "without_usage": sum(record.output_tokens is None for record in good),
        **{name: statistics(values) for name, values in samples(records).items()},
        "errors": [
            {"status": status, "message": message, "count": count} for (status, message), count in errors.most_common()
        ],
    }


def show(found: dict[str, Any], values: dict[str, np.ndarray], width: int, ascii_only: bool = False) -> Group:
    """The summary and the samples that it is of, for a terminal of `width` characters."""
    parts: list[Any] = [Text(line) for line in _lines(found)]
    if found["failed"] < found["requests"]:
        parts += ["", _latencies(found), "", _charts(values, width, ascii_only)]
    if found["errors"]:
        parts += ["", _errors(found["errors"])]
    return Group(*parts)


def _lines(found: dict[str, Any]) -> list[str]:
    done = found["requests"] - found["failed"]
    cached = f", of which {found['cached_prompt_tokens']:,} cached" if found["cached_prompt_tokens"] else ""
    lines = [
        f"{done} of {found['requests']} requests succeeded in {found['duration_s']:.2f} s",
        f"{found['requests_per_s']:.2f} requests/s, {found['output_tokens_per_s']:,.1f} output tokens/s",
        f"{found['prompt_tokens']:,} prompt tokens{cached}; {found['output_tokens']:,} output tokens",
    ]
    if found["without_usage"]:
        lines.append(f"{found['without_usage']} answers had no usage: each of their events counts as one token")
    return lines


def _latencies(found: dict[str, Any]) -> Table:
    columns = ("mean", *(f"p{q}" for q in PERCENTILES), "min", "max")
    table = Table("milliseconds", *columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, title in TITLES.items():
        if each := found[name]:
            table.add_row(title, *(f"{each[column]:,.1f}" for column in columns))
    return table


def _errors(errors: list[dict[str, Any]]) -> Table:
    table = Table("failed", "why", box=None, pad_edge=False)
    table.columns[0].justify = "right"
    for error in errors:
        table.add_row(str(error["count"]), Text(error["message"]))
    return table


def _charts(values: dict[str, np.ndarray], width: int, ascii_only: bool) -> Table:
    """Two histograms beside each other."""
    grid = Table.grid(padding=(1, 4, 0, 0))
    charts = [
        _chart(title, values[name], min(width // 2 - 4, 48), ascii_only)
        for name, title in TITLES.items()
        if values[name].size > 1
    ]
    for pair in batched(charts, 2):
        grid.add_row(*pair)
    return grid


def _chart(title: str, values: np.ndarray, width: int, ascii_only: bool) -> Text:
    """A histogram from the smallest value to the 99th percentile; what is above that is in the last bar."""
    low, high = float(values.min()), float(np.percentile(values, 99))
    above = int((values > high).sum())
    left, right = f"{low:,.1f} ms", f"{high:,.1f} ms" + (f", {above} above" if above else "")
    columns = max(width, len(left) + len(right) + 1)
    bars = histogram(values, low, high, columns, ascii_only)
    return Text("\n".join([title, *bars, left + right.rjust(columns - len(left))]), no_wrap=True)


def histogram(
    values: np.ndarray, low: float, high: float, columns: int, ascii_only: bool = False, height: int = 4
) -> list[str]:
    """`height` lines of bars of `values` between two bounds; those beyond are in the outermost bars.

    The tallest bar is full, and no bar that has a value is empty.
    """
    counts, _ = np.histogram(np.clip(values, low, high), columns, (low, high if high > low else low + 1))
    steps = 1 if ascii_only else len(BLOCKS) - 1
    eighths = np.ceil(counts / counts.max() * height * steps).astype(int)
    blocks = " #" if ascii_only else BLOCKS
    return ["".join(blocks[min(max(n - row * steps, 0), steps)] for n in eighths) for row in reversed(range(height))]
