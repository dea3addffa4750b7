"""A blind user study as one HTML file, and the tally of the votes it exports.

Per sample the page shows the picture before, the instruction and the edits of all methods side by side as A, B, C, ...
Every edit is rated from 1 to 5, ties allowed, for the paper's three criteria: H-SC (does it follow the instruction),
H-PQ (perceptual quality), H-O (overall). Ratings side by side serve for a ranking as well: the page shows the order that
follows from them, the tally derives ranks, win rates and agreement. Strict ranks would give means that depend on the
number of methods and hide that all edits failed. How it is done here: the order of samples and letters differs from
voter to voter, so that neither tiredness nor position favours a method.
"""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np

from data import resize
from evaluation.pages import BLANK, data_url, text, write_page

FORMAT = "edit study votes 1"
CRITERIA = {"H-SC": "Follows the instruction", "H-PQ": "Looks real and clean", "H-O": "Overall"}
LETTERS = "ABCDEFGH"
SCALE = range(1, 6)  # the paper's: 1 worst, 5 best


def study(path: str | Path, rows: list[tuple[str, str, np.ndarray, dict[str, np.ndarray]]], seed: int = 0,
          title: str = "Which edit is best?") -> str:
    """Write the page of rows (id, instruction, source, {method: edit}), pictures (H, W, 3) uint8; returns the study's
    hash, which every vote file carries: it covers ids, instructions, pictures, methods and seed.

    Edits are shown at the size of their source: a method must not be known by its size. ValueError for no rows, a row
    without instruction, an id that occurs twice, fewer than 2 or more than 8 methods, or rows that have different methods.
    """
    if not rows:
        raise ValueError("A study needs at least one sample, found none.")
    methods = sorted(rows[0][3])
    if not 2 <= len(methods) <= len(LETTERS):
        raise ValueError(f"A study compares 2 to {len(LETTERS)} methods, found {len(methods)}: {', '.join(methods) or 'none'}.")
    samples, sealed, ids = [], [], set()
    for index, (name, instruction, source, edits) in enumerate(rows):
        if name in ids:
            raise ValueError(f"Sample {name} occurs twice; ids must be unique.")
        if not instruction:
            raise ValueError(f"Sample {name} has no instruction; a voter cannot judge its edits.")
        if sorted(edits) != methods:
            raise ValueError(f"Sample {name} has edits by {', '.join(sorted(edits))}, the first by {', '.join(methods)}; "
                             "every sample needs one edit of each method.")
        ids.add(name)
        order = np.random.default_rng((seed, index)).permutation(len(methods)).tolist()
        samples.append({"instruction": instruction, "before": data_url(source),
                        "edits": [data_url(resize(edits[methods[i]], *source.shape[:2])) for i in order]})
        digest = hashlib.sha256(json.dumps(samples[-1]).encode()).hexdigest()[:16]
        sealed.append({"id": name, "order": order, "digest": digest})
    # Who made which edit has to travel with the votes, or a lost key file would make them worthless. Base64 keeps the
    # names out of sight of a voter who reads or searches the page's source; it does not stop one who wants to cheat.
    key = base64.b64encode(json.dumps({"methods": methods, "seed": seed, "samples": sealed}).encode()).decode()
    content = {"format": FORMAT, "study": hash_of(key), "key": key, "samples": samples}
    embedded = json.dumps(content).replace("<", "\\u003c")  # no text can end the script element
    body = BODY.format(title=text(title), cards="".join(card(i) for i in range(len(methods))), blank=BLANK,
                       last=LETTERS[len(methods) - 1], data=embedded,
                       orders="".join(f'<div><dt>{name}, best first</dt><dd class="order"></dd></div>'
                                      for name in CRITERIA.values()))
    write_page(path, title, body, STUDY_STYLE, STUDY_SCRIPT)
    return hash_of(key)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def card(index: int) -> str:
    """Letter, picture and the three scales of one edit; the script fills in the sample on show."""
    letter, scales = LETTERS[index], ""
    for c, name in enumerate(CRITERIA.values()):
        marks = "".join(f'<label><input type="radio" name="r{index}-{c}" value="{mark}"><span>{mark}</span></label>'
                        for mark in SCALE)
        scales += (f'<fieldset class="scale"><legend><span class="vh">{letter}: </span>{name}</legend>'
                   f'<div>{marks}</div></fieldset>')
    return (f'<section class="card edit" aria-labelledby="name-{index}"><h3 id="name-{index}">{letter}</h3>'
            f'<button type="button" class="peek" aria-pressed="false"><img src="{BLANK}" alt="Edit {letter}">'
            f'<span>Show before</span></button>{scales}</section>')


BODY = """<header><h1>{title}</h1><p>Compare the edits A to {last} with each other and rate each from 1 (worst) to 5 (best); equal
ratings are allowed. Click or tap an edit to see the picture before in its place.</p><details><summary>Keys, and where your
ratings are</summary><p>Tab goes from question to question, 1 to 5 rates and goes on, A to {last} jumps to an edit, Enter goes to
the next sample, Backspace back. Ratings stay in this browser, also when the page is closed, until you send them as a file. Several
people on one device: open the page with #name at the end of its address.</p></details>
<p id="warning" role="alert" hidden>This browser keeps nothing when the page is closed: export before you leave.</p>
<noscript><p>This page needs JavaScript.</p></noscript></header>
<main><form id="form" autocomplete="off"><h2 id="where">Sample</h2><p id="instruction" aria-live="polite"></p>
<div class="cards"><section class="card" aria-labelledby="before"><h3 id="before">Before</h3>
<img id="source" src="{blank}" alt="Picture before the edit"></section>{cards}</div>
<dl>{orders}</dl><div class="row"><button type="button" id="back">Back</button><button type="button" id="next" class="go">Next</button></div>
<label for="progress" id="done">Progress</label><progress id="progress" value="0" max="1"></progress></form>
<section id="export"><h2 id="send" tabindex="-1">Send your votes</h2><p id="left"></p>
<div class="row"><button type="button" id="missing">First unfinished sample</button>
<button type="button" id="download" class="go">Download the votes</button><button type="button" id="copy">Copy the votes</button></div>
<p id="status" role="status"></p><details><summary>Votes as text</summary><label for="votes">Copy all of this by hand if the
buttons do not work</label><textarea id="votes" rows="4" readonly></textarea></details></section></main>
<script type="application/json" id="data">{data}</script>"""

STUDY_STYLE = """
body{max-width:110rem;--card-width:13rem}@media (pointer:coarse){body{--card-width:17rem}}
summary{cursor:pointer;padding:.65rem 0}
#instruction{font-size:1.2rem;font-weight:600;margin:0;padding:.6rem 0;background:var(--bg)}
@media (min-height:40rem){#instruction{position:sticky;top:0;z-index:1;max-height:30vh;overflow:auto}}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--card-width)),1fr));gap:1rem;align-items:start}
.card{background:var(--card);border-radius:.6rem;padding:.7rem}.card h3{margin-bottom:.3rem}.card img{width:100%}
.peek{display:block;width:100%;padding:0;border:0;background:none;font-size:.85rem}
.peek[aria-pressed=true]{background:none;color:var(--fg);font-weight:700}.peek span{display:block;padding:.3rem}
.scale{border:0;margin:0 0 .5rem;padding:0}.scale legend{padding:0 0 .2rem}
.scale div{display:grid;grid-template-columns:repeat(5,1fr);gap:.3rem}.scale label{position:relative;cursor:pointer}
.scale input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:pointer}
.scale span{display:grid;place-items:center;min-height:2.75rem;border:1px solid var(--edge);border-radius:.4rem;background:var(--bg)}
.scale legend span{display:inline;border:0}
.scale input:checked+span{background:var(--accent);border-color:var(--accent);color:var(--on-accent);font-weight:700}
.scale input:focus-visible+span{outline:3px solid var(--accent);outline-offset:2px}
dl{display:flex;flex-wrap:wrap;gap:.3rem 2rem;margin:1rem 0}dt{color:var(--muted);font-size:.85rem}dd{margin:0;min-height:1.5rem}
.row{display:flex;flex-wrap:wrap;gap:.6rem;margin:.8rem 0}progress{width:100%;height:1rem;accent-color:var(--accent)}
textarea{display:block;width:100%;font:.8rem monospace;background:var(--card);color:var(--fg);border:1px solid var(--edge)}
"""

STUDY_SCRIPT = """
const $ = id => document.getElementById(id), STUDY = JSON.parse($('data').textContent);
const SAMPLES = STUDY.samples.length, EDITS = STUDY.samples[0].edits.length;
const KEY = 'study:' + STUDY.study + location.hash;  // all pages opened as files share one storage
const LETTERS = 'ABCDEFGH', cards = [...document.querySelectorAll('.edit')];
const scales = [...document.querySelectorAll('.scale')], CRITERIA = scales.length / EDITS;

function generator(seed) {  // mulberry32
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
function shuffled(n, random) {
  const order = [...Array(n).keys()];
  for (let i = n - 1; i > 0; i--) { const j = Math.floor(random() * (i + 1)); [order[i], order[j]] = [order[j], order[i]]; }
  return order;
}
function load() {
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(KEY)); } catch { }  // none, damaged, or storage is forbidden
  if (kept && kept.voter && kept.ratings && kept.ratings.length === SAMPLES) return kept;
  const drawn = crypto.getRandomValues(new Uint32Array(3));
  const voter = [drawn[0], drawn[1]].map(x => x.toString(16).padStart(8, '0')).join('');
  return {voter, seed: drawn[2], saved: new Date().toISOString(), at: 0, ratings: Array(SAMPLES).fill(null)};
}
function save() {
  let kept = false;
  try { localStorage.setItem(KEY, JSON.stringify(state)); kept = localStorage.getItem(KEY) !== null; } catch { }
  $('warning').hidden = kept;
}
let state, samples, letters;  // samples[place] = sample; letters[sample][letter] = slot of the edit shown under that letter
function adopt(kept) {
  state = kept;
  const random = generator(state.seed);
  samples = shuffled(SAMPLES, random);
  letters = STUDY.samples.map(() => shuffled(EDITS, random));
}
const now = () => samples[state.at];
const rated = sample => state.ratings[sample] || [];
const finished = sample => rated(sample).length > 0 && rated(sample).flat().every(x => x !== null);
const votes = () => JSON.stringify({format: STUDY.format, study: STUDY.study, voter: state.voter, saved: state.saved,
                                    ratings: state.ratings, key: STUDY.key});
function show() {
  const sample = STUDY.samples[now()];
  $('where').textContent = `Sample ${state.at + 1} of ${SAMPLES}`;
  $('instruction').textContent = sample.instruction;
  $('source').src = sample.before;
  cards.forEach((card, letter) => peek(card, letter, false));
  scales.forEach((scale, i) => {
    const row = rated(now())[letters[now()][Math.floor(i / CRITERIA)]];
    for (const input of scale.querySelectorAll('input')) input.checked = !!row && row[i % CRITERIA] === +input.value;
  });
  $('back').disabled = state.at === 0;
  $('next').textContent = state.at === SAMPLES - 1 ? 'Finish' : 'Next';
  count();
}
function count() {
  const done = samples.filter(finished).length;
  $('progress').max = SAMPLES;
  $('progress').value = done;
  $('done').textContent = `${done} of ${SAMPLES} samples finished`;
  $('left').textContent = done === SAMPLES ? 'All samples are finished. Thank you!' : `${SAMPLES - done} samples are not finished yet.`;
  $('missing').disabled = done === SAMPLES;
  $('votes').value = votes();
  document.querySelectorAll('.order').forEach((line, c) => {  // the ranking that the ratings amount to: A > B = C
    const marks = cards.map((_, letter) => [(rated(now())[letters[now()][letter]] || [])[c], LETTERS[letter]]).filter(m => m[0]);
    marks.sort((a, b) => b[0] - a[0]);
    line.textContent = marks.map((m, i) => (i ? (m[0] === marks[i - 1][0] ? ' = ' : ' > ') : '') + m[1]).join('') || '–';
  });
}
function peek(card, letter, before) {
  const button = card.querySelector('.peek'), sample = STUDY.samples[now()];
  button.setAttribute('aria-pressed', before);
  button.querySelector('img').src = before ? sample.before : sample.edits[letters[now()][letter]];
  button.querySelector('img').alt = before ? 'Picture before the edit' : 'Edit ' + LETTERS[letter];
  button.querySelector('span').textContent = before ? 'This is before. Show edit' : 'Show before';
}
function rate(i, mark) {
  state.ratings[now()] ||= Array.from({length: EDITS}, () => Array(CRITERIA).fill(null));
  rated(now())[letters[now()][Math.floor(i / CRITERIA)]][i % CRITERIA] = mark;
  state.saved = new Date().toISOString();
  save();
  count();
}
function focusScale(i, options) { (scales[i].querySelector('input:checked') || scales[i].querySelector('input')).focus(options); }
function go(place) {
  if (place < 0) return;
  if (place >= SAMPLES) { $('send').focus(); return; }
  state.at = place;
  save();
  show();
  scrollTo(0, $('where').offsetTop);
  focusScale(Math.max(0, scales.findIndex(scale => !scale.querySelector('input:checked'))), {preventScroll: true});
}
$('form').onchange = event => { rate(scales.indexOf(event.target.closest('.scale')), +event.target.value); };
$('form').onsubmit = event => event.preventDefault();
$('form').onkeydown = event => {  // keys act only while the focus is in the form: a single letter is no global command
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const radio = event.target.type === 'radio', key = event.key.toUpperCase(), letter = LETTERS.indexOf(key);
  const card = event.target.closest('.edit');
  if (/^[1-5]$/.test(key) && card) {
    const scale = event.target.closest('.scale'), i = scale ? scales.indexOf(scale) : cards.indexOf(card) * CRITERIA;
    scales[i].querySelector(`input[value="${key}"]`).checked = true;
    rate(i, +key);
    if (i + 1 < scales.length) focusScale(i + 1); else $('next').focus();
  } else if (key.length === 1 && letter >= 0 && letter < EDITS) focusScale(letter * CRITERIA);
  else if (key === 'ENTER' && radio) go(state.at + 1);
  else if (key === 'BACKSPACE') go(state.at - 1);
  else return;
  event.preventDefault();
};
cards.forEach((card, letter) => {
  const button = card.querySelector('.peek');
  button.onclick = () => peek(card, letter, button.getAttribute('aria-pressed') === 'false');
});
$('back').onclick = () => go(state.at - 1);
$('next').onclick = () => go(state.at + 1);
$('missing').onclick = () => go(samples.findIndex(sample => !finished(sample)));
$('download').onclick = () => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([votes()], {type: 'application/json'}));
  link.download = `votes_${STUDY.study}_${state.voter}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  $('status').textContent = `Downloaded as ${link.download}.`;
};
$('copy').onclick = async () => {
  try { await navigator.clipboard.writeText(votes()); $('status').textContent = 'Copied.'; }
  catch { $('status').textContent = 'This browser does not let the page copy; open "Votes as text" below.'; }
};
addEventListener('storage', event => { if (event.key === KEY && event.newValue) { adopt(load()); show(); } });  // a second tab
addEventListener('hashchange', () => location.reload());  // another voter
adopt(load());
save();
show();
"""
