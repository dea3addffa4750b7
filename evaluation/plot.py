"""Bars and curves with intervals as SVG, inline for the report page or a file: no library, no script, readable in light and
dark."""

import html
import math
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 52, 44  # of curves, their left and lower margins
COLOURS = """
:root{color-scheme:light;--bg:#ffffff;--card:#f3f5f8;--fg:#1a1f26;--muted:#545d69;--line:#cfd5dd;--edge:#6a7380;
--accent:#0b57b0;--on-accent:#ffffff;
--s0:#0b57b0;--s1:#a84f06;--s2:#17734a;--s3:#8236b0;--s4:#b3261e;--s5:#545d69}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;--bg:#13161a;--card:#1d2127;--fg:#e8ebef;
--muted:#a6aeb9;--line:#3a414b;--edge:#87909c;--accent:#8ab8f5;--on-accent:#0c1a2b;
--s0:#8ab8f5;--s1:#f0a868;--s2:#70cf98;--s3:#d0a2f0;--s4:#f28b82;--s5:#a6aeb9}}
"""
DRAWING = """
.grid{stroke:var(--line)}.curve,.range{fill:none;stroke-width:2}
.e0{stroke:var(--s0)}.e1{stroke:var(--s1)}.e2{stroke:var(--s2)}.e3{stroke:var(--s3)}.e4{stroke:var(--s4)}.e5{stroke:var(--s5)}
.s0{fill:var(--s0)}.s1{fill:var(--s1)}.s2{fill:var(--s2)}.s3{fill:var(--s3)}.s4{fill:var(--s4)}.s5{fill:var(--s5)}
"""


def text(value) -> str:
    """Any value as HTML text, safe between tags and inside quoted attributes."""
    return html.escape(str(value), quote=True)


def boxed(caption: str, name: str, inner: str, kind: str = "") -> str:
    """A table in a box of its own that scrolls sideways, reachable by keyboard and named by the caption."""
    return (f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}"><table class="{kind}">'
            f'<caption id="{name}"><span>{text(caption)}</span></caption>{inner}</table></div>')


@dataclass(frozen=True)
class Bars:
    """One bar per label and series with its interval: series[name][i] = (value, low, high) of labels[i], or None."""
    caption: str
    unit: str
    labels: list[str]
    series: dict[str, list[tuple[float, float, float] | None]]


@dataclass(frozen=True)
class Curves:
    """series[name]: points (x, value, low, high) with x ascending."""

    caption: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float, float, float]]]


def draw(curves: Curves) -> str:
    """What stands inside an <svg> of WIDTH x HEIGHT."""
    points = [point for line in curves.series.values() for point in line]
    if not points:
        raise ValueError(f'Curves "{curves.caption}" have no points.')
    right = round_up(max(x for x, *_ in points)) or 1.0
    top = round_up(max(y for _, *values in points for y in values if math.isfinite(y))) or 1.0

    def at(x: float, y: float, shift: float = 0) -> str:
        return f"{LEFT + x / right * (WIDTH - LEFT - 24) + shift:.1f},{(1 - y / top) * (HEIGHT - BOTTOM - 10) + 10:.1f}"

    def line(kind: str, a: str, b: str) -> str:
        (x1, y1), (x2, y2) = a.split(","), b.split(",")
        return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'

    def label(where: str, words: str, dx: int = 0, dy: int = 0, anchor: str = "middle") -> str:
        x, y = map(float, where.split(","))
        return f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{text(words)}</text>'

    parts = []
    for i in range(5):
        parts += [line("grid", at(0, top * i / 4), at(right, top * i / 4)), label(at(0, top * i / 4), f"{top * i / 4:.3g}", -6, 4, "end"),
                  label(at(right * i / 4, 0), f"{right * i / 4:.3g}", 0, 16)]
    parts += [label(at(right / 2, 0), curves.x_label, 0, 36), label(at(0, top), curves.y_label, 6, -1, "start")]
    for kind, values in enumerate(curves.series.values()):
        shift = 4 * (kind - (len(curves.series) - 1) / 2)  # pixels, so that equal curves stay visible side by side
        parts += [line(f"range e{kind % 6}", at(x, low, shift), at(x, high, shift)) for x, _, low, high in values]
        parts.append(f'<polyline class="curve e{kind % 6}" points="{" ".join(at(x, y, shift) for x, y, *_ in values)}"/>')
        for place in (at(x, y, shift).split(",") for x, y, *_ in values):
            parts.append(f'<circle class="s{kind % 6}" r="3.5" cx="{place[0]}" cy="{place[1]}"/>')
    return "".join(parts)


def curves_svg(drawn: list[Curves]) -> str:
    """A file: the drawings below each other, with the series of the first as a legend for all."""
    step, names = HEIGHT + 40, list(drawn[0].series)
    height, slot = 30 + step * len(drawn), (WIDTH - 8) / len(names)
    parts = [f'<rect width="{WIDTH}" height="{height}" fill="var(--bg)"/>']
    for i, name in enumerate(names):
        parts.append(f'<rect class="s{i % 6}" x="{8 + i * slot:.0f}" y="13" width="16" height="4"/>'
                     f'<text x="{30 + i * slot:.0f}" y="20">{text(name)}</text>')
    for i, curves in enumerate(drawn):
        top = 30 + step * i
        parts.append(f'<text class="caption" x="{LEFT}" y="{top + 20}">{text(curves.caption)}</text><g transform="translate(0 {top + 34})">{draw(curves)}</g>')
    style = f"{COLOURS}{DRAWING}text{{fill:var(--muted);font:13px system-ui,sans-serif}}.caption{{fill:var(--fg);font-weight:600}}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
            f'<title>{text("; ".join(curves.caption for curves in drawn))}</title><style>{style}</style>{"".join(parts)}</svg>\n')


def curves_html(curves: Curves, index: int) -> str:
    """The drawing, hidden from screen readers, and below it the same numbers as a table that can be folded out."""
    keys, rows = "", []
    for kind, (name, values) in enumerate(curves.series.items()):
        keys += f'<li><svg aria-hidden="true" width="22" height="10"><rect class="s{kind % 6}" y="3" width="22" height="4"/></svg> {text(name)}</li>'
        rows += [[name, f"{x:.4g}", f"{y:.3f} [{low:.3f}, {high:.3f}]"] for x, y, low, high in values]
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in ("series", curves.x_label, curves.y_label))
    body = "".join(f'<tr><th scope="row">{text(row[0])}</th>' + "".join(f'<td class="n">{cell}</td>' for cell in row[1:]) + "</tr>" for row in rows)
    table = boxed(curves.caption, f"curves-{index}", f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")
    return (f'<figure class="curves"><figcaption>{text(curves.caption)}</figcaption>'
            f'<svg aria-hidden="true" viewBox="0 0 {WIDTH} {HEIGHT}">{draw(curves)}</svg><ul class="keys">{keys}</ul>'
            f"<details><summary>The numbers</summary>{table}</details></figure>")


def round_up(x: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten: the end of an axis."""
    if x <= 0:
        return 0.0
    power = 10 ** math.floor(math.log10(x))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= x * (1 - 1e-9))


def bars_html(bars: Bars, index: int) -> str:
    """Bars as a table: name, drawing, number. The number beside each drawing is its text alternative, so the drawing
    itself is hidden from screen readers; widths are percentages, so letters keep their size on a phone."""
    for name, values in bars.series.items():
        if len(values) != len(bars.labels):
            raise ValueError(f'Bars "{bars.caption}": {len(bars.labels)} labels, but series {name} has {len(values)} values.')
    known = [x for values in bars.series.values() for triple in values if triple for x in triple if math.isfinite(x)]
    left, right = 0.0 - round_up(-min([0, *known])), round_up(max([0, *known]))
    right = right if right > left else left + 1
    digits = 1 if max(right, -left) > 2 else 3

    def at(x: float) -> str:
        return f"{100 * (x - left) / (right - left):.2f}%"

    def row(name: str, triple, kind: int) -> str:
        drawing, number = "", "not measured"
        if triple and math.isfinite(triple[0]):
            value, low, high = triple
            start, end = sorted((0.0, value))
            width = f"{100 * (end - start) / (right - left):.2f}%"
            drawing = f'<rect class="s{kind % 6}" x="{at(start)}" y="3" width="{width}" height="12"/>'
            number = f"{value:.{digits}f}"
            if math.isfinite(low) and math.isfinite(high):
                ends = ((at(low), at(high), 9, 9), (at(low), at(low), 5, 13), (at(high), at(high), 5, 13))
                drawing += "".join(f'<line class="{c}" x1="{a}" x2="{b}" y1="{y}" y2="{z}"/>'
                                   for c in ("halo", "whisker") for a, b, y, z in ends)
                number += f" <span>[{low:.{digits}f}, {high:.{digits}f}]</span>"
        grid = "".join(f'<line class="grid" x1="{at(x)}" x2="{at(x)}" y1="0" y2="18"/>'
                       for x in {left, 0.0, (left + right) / 2, right})
        return (f'<tr><th scope="row">{text(name)}</th><td class="plot"><svg aria-hidden="true" width="100%" height="18">'
                f'{grid}{drawing}</svg></td><td class="n">{number}</td></tr>')

    single, bodies = len(bars.series) == 1, ""
    for i, label in enumerate(bars.labels):
        if not single:
            bodies += f'<tbody><tr><th scope="rowgroup" colspan="3">{text(label)}</th></tr>'
        bodies += "".join(row(label if single else name, values[i], kind)
                          for kind, (name, values) in enumerate(bars.series.items()))
        bodies += "" if single else "</tbody>"
    ticks = "".join(f'<text x="{at(x)}" y="12" text-anchor="{anchor}">{x:g}</text>'
                    for x, anchor in ((left, "start"), ((left + right) / 2, "middle"), (right, "end")))
    axis = (f'<tfoot><tr><td></td><td class="plot"><svg aria-hidden="true" width="100%" height="16">{ticks}</svg></td>'
            f'<td class="n">{text(bars.unit)}</td></tr></tfoot>')
    head = (f'<thead class="vh"><tr><th scope="col">{"Label" if single else "Series"}</th><th scope="col">Bar</th>'
            '<th scope="col">Value</th></tr></thead>')
    bodies = f"<tbody>{bodies}</tbody>" if single else bodies
    return boxed(bars.caption, f"bars-{index}", head + bodies + axis, "bars")
