"""How a page is drawn: one HTML file with everything in it, that opens from a disk and prints.

Charts are plotly's. Ranks and kinds differ by dash, marker or pattern as well as by colour (the palette of Okabe and
Ito 2008, which people who do not see all colours can tell apart), and each is named where it is drawn.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from zeropipe.errors import ConfigError

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_PATTERNS = ("", "/", "x", "-", "|", "+", ".", "\\")
_MOST_RANKS = 8  # that a chart shows one by one
_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --ground: #ffffff; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--ground);
       font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p.soft, .soft { color: var(--soft); } .chart { margin: .25rem 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .9rem; }
td { overflow-wrap: anywhere; } td:first-child { white-space: nowrap; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; }
.facts div { min-width: 8rem; } .facts b { display: block; font-size: 1.25rem; }
.changed td { font-weight: 600; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .chart, table { break-inside: avoid; }
               details > summary { display: none; } }
"""


class Page:
    """Sections one after the other, then the whole as text."""

    def __init__(self, title: str, below: str) -> None:
        self._go = _plotly("plotly.graph_objects")
        self._io = _plotly("plotly.io")
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="soft">{html.escape(below)}</p>']
        self._charts = 0

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def say(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def facts(self, rows: Mapping[str, str]) -> None:
        cells = "".join(f"<div>{html.escape(k)}<b>{html.escape(v)}</b></div>" for k, v in rows.items())
        self._parts.append(f'<div class="facts">{cells}</div>')

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]], bold: Iterable[int] = ()) -> None:
        """Columns of numbers stand to the right; rows of the numbers ``bold`` stand out."""
        strong = set(bold)
        body = []
        listed = [list(row) for row in rows]
        columns = list(zip(*listed, strict=True))
        numbers = {
            at for at, cells in enumerate(columns) if all(isinstance(cell, int | float) for cell in cells)
        }
        for at, row in enumerate(listed):
            kind = ' class="changed"' if at in strong else ""
            cells = (_cell("td", cell, column in numbers) for column, cell in enumerate(row))
            body.append(f"<tr{kind}>{''.join(cells)}</tr>")
        top = "".join(_cell("th", cell, column in numbers) for column, cell in enumerate(head))
        self._parts.append(f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>")

    def folded(self, summary: str) -> None:
        self._parts.append(f"<details open><summary>{html.escape(summary)}</summary>")

    def unfolded(self) -> None:
        self._parts.append("</details>")

    def lines(
        self,
        title: str,
        x: str,
        y: str,
        series: Mapping[str, tuple[Sequence[Any], Sequence[Any]]],
        **axis: Any,
    ) -> None:
        """One line for each of ``series``: name -> (x, y)."""
        figure = self._go.Figure()
        for at, (name, (xs, ys)) in enumerate(series.items()):
            figure.add_scatter(
                x=list(xs),
                y=list(ys),
                name=name,
                mode="lines+markers" if len(xs) < 40 else "lines",
                line={"color": _COLOURS[at % len(_COLOURS)], "dash": _DASHES[at % len(_DASHES)], "width": 2},
                marker={"symbol": at % 8, "size": 6},
            )
        self._chart(figure, title, x, y, **axis)

    def bars(
        self, title: str, x: str, y: str, names: Sequence[str], series: Mapping[str, Sequence[float]]
    ) -> None:
        """Stacked: one bar for each of ``names``."""
        figure = self._go.Figure()
        for at, (kind, values) in enumerate(series.items()):
            figure.add_bar(x=list(names), y=list(values), name=kind, marker=_filled(at))
        figure.update_layout(barmode="stack")
        self._chart(figure, title, x, y)

    def spans(
        self, title: str, rows: Mapping[str, Sequence[tuple[str, float, float]]], x: str = "milliseconds"
    ) -> None:
        """A timeline: for each row its (what, begin, end) in ``x``."""
        figure = self._go.Figure()
        kinds = list(dict.fromkeys(what for spans in rows.values() for what, _, _ in spans))
        for at, kind in enumerate(kinds):
            found = [
                (row, begin, end) for row, spans in rows.items() for what, begin, end in spans if what == kind
            ]
            figure.add_bar(
                y=[row for row, _, _ in found],
                x=[end - begin for _, begin, end in found],
                base=[begin for _, begin, _ in found],
                orientation="h",
                name=kind,
                marker=_filled(at),
            )
        figure.update_layout(barmode="overlay")
        figure.update_yaxes(autorange="reversed")
        self._chart(figure, title, x, "", height=120 + 36 * max(2, len(rows)))

    def _chart(self, figure: Any, title: str, x: str, y: str, height: int = 300, **axis: Any) -> None:
        figure.update_layout(
            title={"text": title, "font": {"size": 15}},
            template="plotly_white",
            height=height,
            margin={"l": 70, "r": 20, "t": 44, "b": 48},
            legend={"orientation": "h", "y": -0.22},
            font={"size": 13},
        )
        figure.update_xaxes(title=x, rangemode="tozero" if x == "step" else "normal")
        figure.update_yaxes(title=y, **axis)
        # The library itself goes in once, with the first chart.
        text = self._io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=self._charts == 0,
            include_mathjax=False,
            config={"displaylogo": False, "responsive": True},
        )
        self._charts += 1
        self._parts.append(f'<div class="chart">{text}</div>')

    def text(self) -> str:
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head><body>"
            + "\n".join(self._parts)
            + "</body></html>\n"
        )


def _filled(at: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[at % len(_COLOURS)],
        "pattern": {"shape": _PATTERNS[at % len(_PATTERNS)], "fgcolor": "#ffffff", "fgopacity": 0.6},
        "line": {"color": "#ffffff", "width": 0.5},
    }


def _cell(tag: str, value: object, number: bool) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if isinstance(value, float):
        text = f"{value:,.4g}"
    return f"<{tag}{' class=number' if number else ''}>{html.escape(text)}</{tag}>"


def _plotly(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError("a report's charts need plotly", fix="pip install 'zeropipe[plot]'") from error


def write(text: str, path: Path) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
