"""The report of an evaluation as one HTML file that opens without a server or a network, and what the study page shares.

In: numbers that are already formatted, means with intervals, pictures as uint8 arrays (H, W, 3). Out: a page for light
and dark screens, wide and 360 px narrow, keyboard, screen reader and paper. Every text is escaped here, so callers pass
instructions, method names and error messages as they are. A Content-Security-Policy forbids the page to load anything.
"""

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data import resize
from evaluation.plot import COLOURS, DRAWING, Bars, Curves, bars_html, boxed, curves_html, text

LONGEST_SIDE = 512  # of an embedded picture, pixels: what the paper's pictures have


@dataclass(frozen=True)
class Table:
    """caption says what is measured, on what; the first column of `rows` names them. note: a line below the table."""
    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One sample: pictures by caption, the source first, then the edit. kind: "best", "worst" or "" (its section)."""
    title: str
    instruction: str
    pictures: dict[str, np.ndarray]
    numbers: dict[str, str] = field(default_factory=dict)
    kind: str = ""


def report(path: str | Path, title: str, facts: dict[str, str], tables: list[Table], bars: list[Bars],
           cases: list[Case], notes: list[str], curves: list[Curves] = ()) -> None:
    """Write the page: facts (model, judge, seeds, date, ...), curves, tables, bars, notes, then the worst, best and other cases.

    ValueError if a table's row or a series has another length than its header or labels, or a case has no picture.
    """
    body = [f"<header><h1>{text(title)}</h1>{pairs(facts, 'facts')}</header><main>"]
    body += [section(heading, parts) for heading, parts in (
        ("Curves", [curves_html(c, i) for i, c in enumerate(curves)]),
        ("Results", [table_html(table, i) for i, table in enumerate(tables)]),
        ("Means and intervals", [bars_html(b, i) for i, b in enumerate(bars)]),
        ("Notes", ["<ul>" + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>"] if notes else []),
        *((heading, ['<div class="cases">' + "".join(map(case_html, chosen)) + "</div>"] if chosen else [])
          for heading, kind in (("Worst cases", "worst"), ("Best cases", "best"), ("Cases", ""))
          for chosen in [[case for case in cases if case.kind == kind]]))]
    write_page(path, title, "".join(body) + "</main>" + (DIALOG if cases else ""), REPORT_STYLE, VIEWER if cases else "")


# Shared with the study page


def data_url(image: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data URL: longest side at most 512, JPEG of quality 90 or PNG, the smaller."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"Expected a picture (H, W, 3) of uint8, found {image.shape} of {image.dtype}.")
    scale = min(1, LONGEST_SIDE / max(image.shape[:2]))
    picture = Image.fromarray(resize(image, *(max(1, round(side * scale)) for side in image.shape[:2])))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90, "subsampling": 0})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        encoded.append((buffer.tell(), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def write_page(path: str | Path, title: str, body: str, style: str, script: str) -> None:
    """One HTML file; a temporary name first, so that an interruption leaves no half page. Missing folders are made."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<style>{STYLE}{style}</style></head>\n<body>{body}"
            + (f"<script>{script}</script>" if script else "") + "</body></html>\n")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(page.encode("utf-8", "replace"))  # a judge's text may hold half a surrogate pair
    os.replace(partial, path)


# Parts of the report


def section(heading: str, parts: list[str]) -> str:
    return f"<section><h2>{heading}</h2>{''.join(parts)}</section>" if parts else ""


def pairs(values: dict[str, str], kind: str) -> str:
    items = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def is_number(cell: str) -> bool:
    return cell.strip()[:1].isdigit() or (cell.strip()[:1] in "+-−.±" and any(c.isdigit() for c in cell))


def table_html(table: Table, index: int) -> str:
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(f'Table "{table.caption}" has {len(table.header)} columns, but the row {row} has {len(row)}.')
    columns = [[cell for cell in column if cell.strip() not in ("", "-", "–", "—")]
               for column in ([row[i] for row in table.rows] for i in range(len(table.header)))]
    align = [' class="n"' if column and all(map(is_number, column)) else "" for column in columns]
    head = "".join(f'<th scope="col"{a}>{text(cell)}</th>' for cell, a in zip(table.header, align))
    rows = ""
    for row in table.rows:
        cells = "".join(f"<td{a}>{text(cell)}</td>" for cell, a in zip(row[1:], align[1:]))
        rows += f'<tr><th scope="row">{text(row[0])}</th>{cells}</tr>'
    note = f'<p class="note">{text(table.note)}</p>' if table.note else ""
    return boxed(table.caption, f"table-{index}", f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>") + note


def case_html(case: Case) -> str:
    if not case.pictures:
        raise ValueError(f'Case "{case.title}" has no picture; give at least the source and the edit.')
    images = ""
    for caption, image in case.pictures.items():
        height, width = image.shape[:2]
        images += (f'<span><img src="{data_url(image)}" width="{width}" height="{height}" '
                   f'alt="{text(caption)}, {text(case.title)}" data-caption="{text(caption)}"><span aria-hidden="true">{text(caption)}</span></span>')
    return (f'<figure class="case"><figcaption><h3>{text(case.title)}</h3><p>{text(case.instruction)}</p></figcaption>'
            f'<button type="button" class="open"><span class="vh">Enlarge: </span>{images}</button>'
            f'{pairs(case.numbers, "numbers")}</figure>')


STYLE = COLOURS + """
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1rem;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0 1rem}h2{font-size:1.25rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:0}
button{font:inherit;color:var(--fg);background:var(--card);border:1px solid var(--edge);border-radius:.4rem;
padding:.5rem .9rem;min-height:2.75rem;min-width:2.75rem;cursor:pointer;-webkit-tap-highlight-color:transparent}
button[aria-pressed=true],button.go{background:var(--accent);border-color:var(--accent);color:var(--on-accent)}
button:disabled{cursor:default;color:var(--muted);border-style:dashed}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.vh{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
img{display:block;max-width:100%;height:auto}
"""

REPORT_STYLE = DRAWING + """
dl{margin:0}dt{color:var(--muted);font-size:.85rem}dd{margin:0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:.6rem 1.5rem}
.scroll{overflow-x:auto;margin:1rem 0 .3rem;max-width:100%}
table{border-collapse:collapse;overflow-wrap:normal;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.2rem 0 .5rem}
caption span{position:sticky;left:0;display:inline-block;max-width:min(70rem,calc(100vw - 2rem))}
th,td{padding:.35rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{border-bottom:2px solid var(--edge);vertical-align:bottom}
tbody th{font-weight:500;background:var(--bg);position:sticky;left:0;min-width:7rem}
.n{text-align:right;white-space:nowrap}
.note,.help{color:var(--muted);font-size:.9rem;margin:.2rem 0 1.5rem}dialog .help{margin:.4rem 0 0}
.bars{width:100%;max-width:55rem}.bars th,.bars td{border:0;padding:.1rem .4rem}
.bars th[scope=rowgroup]{padding-top:.7rem;font-weight:600}
.bars th[scope=row]{min-width:clamp(5.5rem,27vw,12rem);font-weight:400;overflow-wrap:anywhere}
.bars .plot{width:100%;min-width:5.5rem}.bars .n span{color:var(--muted);display:inline-block}.bars svg{display:block;overflow:visible}
.bars tfoot{color:var(--muted);font-size:.85rem}
.bars text{fill:var(--muted);font-size:.75rem}
.curves{margin:1rem 0 2rem;max-width:44rem}.curves figcaption{font-weight:600;margin-bottom:.5rem}
.curves>svg{display:block;width:100%;height:auto}.curves text{fill:var(--muted);font-size:13px}
.keys{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;padding:0;margin:.5rem 0}
.whisker{stroke:var(--fg);stroke-width:1.5}.halo{stroke:var(--bg);stroke-width:4}
.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem}
.case{margin:0;padding:.8rem;background:var(--card);border-radius:.6rem;break-inside:avoid}
.case p{margin:.1rem 0 .6rem}
.open{display:flex;gap:.5rem;width:100%;padding:.3rem;border-color:transparent;background:none;cursor:zoom-in;font-size:.85rem}
.open>span:not(.vh){flex:1;min-width:0}.open img{width:100%;border-radius:.2rem}
.numbers{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin-top:.5rem}.numbers dd{font-variant-numeric:tabular-nums}
dialog{width:min(100vw - 1rem,60rem);max-width:none;max-height:calc(100vh - 1rem);padding:.8rem;border:1px solid var(--edge);
border-radius:.6rem;background:var(--bg);color:var(--fg)}
dialog::backdrop{background:#000b}dialog h2{margin:0}dialog p{margin:.2rem 0 .5rem}
.row{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center;justify-content:space-between}
#flip{display:block;width:100%;height:min(60vh,90vw);padding:0;background:var(--card);border-color:transparent}
#flip img{width:100%;height:100%;object-fit:contain}
@media (max-width:30rem){.bars .n span{display:block;font-size:.8rem;line-height:1.2}th,td{padding:.3rem .45rem}}
@media print{dialog{display:none}.scroll{overflow:visible}body{max-width:none;font-size:10pt}
.bars rect{print-color-adjust:exact}h2{break-after:avoid}}
"""

BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="  # 1 x 1: an img without src is invalid

DIALOG = f"""<dialog id="view" aria-labelledby="view-title" aria-describedby="view-text">
<div class="row"><h2 id="view-title">Case</h2><button type="button" id="close">Close</button></div><p id="view-text"></p>
<button type="button" id="flip" aria-describedby="view-caption"><span class="vh">Flip before and after: </span>
<img id="view-image" src="{BLANK}" alt="enlarged picture"></button>
<p id="view-caption" aria-live="polite"></p><div class="row"><div class="row" id="choices" role="group" aria-label="Picture"></div>
<div class="row"><button type="button" id="before">Previous case</button><button type="button" id="after">Next case</button></div></div>
<p class="help">Space, or a click on the picture: before and after. Arrows left and right: pictures; up and down: cases.
Escape closes.</p></dialog>"""

VIEWER = """
const $ = id => document.getElementById(id), view = $('view');
const cases = [...document.querySelectorAll('.case')], openers = cases.map(c => c.querySelector('.open'));
let at = 0, shown = 1, edit = 1;  // the case, its picture on show, the picture that the source is flipped with
function show(picture) {
  const images = [...cases[at].querySelectorAll('img')], n = images.length;
  shown = (picture + n) % n;
  edit = Math.min(shown || edit, n - 1);
  $('view-title').textContent = cases[at].querySelector('h3').textContent;
  $('view-text').textContent = cases[at].querySelector('p').textContent;
  $('view-image').src = images[shown].src;
  $('view-image').alt = images[shown].alt;
  $('view-caption').textContent = `${images[shown].dataset.caption}, picture ${shown + 1} of ${n}`;
  const held = [...$('choices').children].indexOf(document.activeElement);
  $('choices').replaceChildren(...images.map((image, i) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = image.dataset.caption;
    button.setAttribute('aria-pressed', i === shown);
    button.onclick = () => show(i);
    return button;
  }));
  if (held >= 0) $('choices').children[Math.min(held, n - 1)].focus();
}
function turn(step) { at = (at + step + cases.length) % cases.length; edit = 1; show(1); }
const flip = () => show(shown ? 0 : edit);
openers.forEach((button, i) => button.onclick = () => { at = i; edit = 1; show(1); view.showModal(); $('flip').focus(); });
$('flip').onclick = flip;
$('close').onclick = () => view.close();
$('before').onclick = () => turn(-1);
$('after').onclick = () => turn(1);
view.onclick = event => { if (event.target === view) view.close(); };
view.onclose = () => openers[at].focus();  // where the reader now is, not where the dialog was opened
view.onkeydown = event => {
  const act = {ArrowLeft: () => show(shown - 1), ArrowRight: () => show(shown + 1),
               ArrowUp: () => turn(-1), ArrowDown: () => turn(1)}[event.key];
  if (act) { act(); event.preventDefault(); }
  if (event.key === 'Tab') {  // the page behind is inert; this keeps the focus from leaving for the browser's own bars
    const stops = [...view.querySelectorAll('button')], last = stops.length - 1, here = stops.indexOf(document.activeElement);
    if (event.shiftKey ? here <= 0 : here === last) { stops[event.shiftKey ? last : 0].focus(); event.preventDefault(); }
  }
};
"""
