"""Sentences that tell a move: what is known of it from the masks, checks of a sentence against that, a sentence made from it.

In: a row of a JSON-lines file (data.py); coordinates are shares of the picture, y down. Left and right are the viewer's.
Which words are checked, and the thresholds, are ours; the paper publishes none.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data import read_labels, read_mask, resolve

VERBS = ("move", "place", "put", "shift", "slide", "bring", "relocate")
BANNED = frozenset("""image images picture pictures photo photos pixel pixels coordinate coordinates first second before after
    percent 3d render rendering""".split())
COLOURS = frozenset("red orange yellow green cyan blue purple violet pink brown black white gray grey golden silver".split())
# Words that several objects share: they do not show that the right one is meant.
ADJECTIVES = COLOURS | frozenset("""small big large tiny little tall short long old new dark light bright wooden metal metallic plastic rubber
    stone glass striped round square object thing item model piece shape a an the of with and in on to for its at""".split())
WHERE = frozenset("""left right front behind between next beside near nearer close closer toward towards farther further away
    back backward backwards forward forwards corner center centre middle foreground background edge against along opposite
    leftward leftwards rightward rightwards rear side front under above onto""".split())
SHIFT = 0.03  # of the width: the least sideways move that "left" and "right" may be said of
RISE, GROWTH = 0.01, 1.1  # of the height, of the area: the least sign of a move in depth
SWAPPED = "it describes the way back, from AFTER to BEFORE"


@dataclass(frozen=True)
class Place:
    """Where a mask lies, in shares of the picture's width and height, y down; area of both."""

    x: float  # centroid
    y: float
    bottom: float  # lower edge: on a floor, larger is nearer to the camera
    area: float
    box: tuple[float, float, float, float]  # left, top, right, bottom

    @staticmethod
    def of(mask: np.ndarray | None) -> "Place | None":
        """None for no mask or one without pixels."""
        if mask is None or not mask.any():
            return None
        (H, W), (y, x) = mask.shape, np.nonzero(mask)
        box = tuple(float(v) for v in (x.min() / W, y.min() / H, (x.max() + 1) / W, (y.max() + 1) / H))
        return Place(float(x.mean() + 0.5) / W, float(y.mean() + 0.5) / H, box[3], len(x) / mask.size, box)

    def distance(self, other: "Place") -> float:
        return float(np.hypot(self.x - other.x, self.y - other.y))


@dataclass(frozen=True)
class Facts:
    """What is known of a move. Without masks there are no places; without label masks no others."""

    names: tuple[str, ...] = ()  # of the moved object: description, category
    start: Place | None = None
    end: Place | None = None
    others: dict[str, list[Place]] = field(default_factory=dict)  # name -> places in the target picture


def facts(jsonl: str | Path, row: dict) -> Facts:
    """The facts of a row of a JSON-lines file; FileNotFoundError or ValueError for a mask that cannot be read."""
    thing, objects, label = row.get("object") or {}, row.get("objects") or {}, row.get("mask_label")
    names = [thing.get("description"), thing.get("category"), objects.get(str(label))]
    names = dict.fromkeys(re.sub(r"^(a|an|the) ", "", name.strip().rstrip(".").lower()) for name in names if name)
    others = {}
    if label and row.get("mask_tgt"):
        labels = read_labels(resolve(jsonl, row, "mask_tgt"))
        for other in np.unique(labels[labels > 0]):
            name = objects.get(str(other))
            if other != label and name and (labels == other).mean() > 0.002:
                others.setdefault(re.sub(r"^(a|an|the) ", "", name.lower()), []).append(Place.of(labels == other))
    start, end = (Place.of(read_mask(jsonl, row, key)) for key in ("mask_ref", "mask_tgt"))
    return Facts(tuple(names), *((start, end) if start and end else (None, None)), others)


def stem(word: str) -> str:
    """Singular, roughly: boxes box, berries berry, cars car."""
    for ending, single in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2 and not word.endswith("ss"):
            return word[:-len(ending)] + single
    return word


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def nouns(text: str) -> set[str]:
    """Stems of the words that tell one kind of object from another; of all words if there are no such."""
    return {stem(w) for w in words(text) if w not in ADJECTIVES} or {stem(w) for w in words(text)}


def clash(one: str, two: str) -> bool:
    """Whether both name colours, and different ones."""
    one, two = COLOURS & set(words(one)), COLOURS & set(words(two))
    return bool(one and two and not one & two)


def named(phrase: str | None, known: Facts) -> Place | None:
    """The place of the one other object that the beginning of `phrase` names; None if it names none or several."""
    phrase = re.split(r"[,.;]| and | so | in | on | at | near | close", phrase or "")[0]
    found = {name: places for name, places in known.others.items() if nouns(phrase) & nouns(name)
             and not clash(phrase, name)}
    if len(found) > 1:  # "the tall lamp" among lamps: by all words
        found = {name: places for name, places in found.items() if set(words(name)) <= set(words(phrase))}
    places = [place for group in found.values() for place in group]
    return places[0] if len(places) == 1 else None


OF = r"(?: of (?P<ref>[^,.;]+))?"
SIDES = r"(near|front|bottom|lower|far|back|rear|top|upper)?[ -]?(left|right)(?:[ -]hand)?"
CORNER = re.compile(rf"\b{SIDES} corner\b|\bcorner (?:at|on|in|to) the {SIDES}")
BETWEEN = re.compile(r"\bbetween (?P<one>[^,.;]+?) and (?P<two>[^,.;]+)")
BESIDE = re.compile(r"\b(?:next to|beside|near|close to|by) (?P<ref>[^,.;]+)")
# "right behind" is no side, and neither is "the right shoe" when it is the object, whose name is taken out beforehand.
SIDE = re.compile(r"\b(left|right)(?:wards?)?\b(?! (?:next|beside|behind|in|between|near|by|at|up)\b)"
                  r"(?:[ -]hand)?(?: (?:side|edge|half|part|third|end))?" + OF)
FRONT = re.compile(r"\b(?P<word>front|behind|back)\b(?: of)?(?: (?P<ref>[^,.;]+))?")
DEPTH = re.compile(r"\b(?P<word>closer|nearer|forwards?|foreground|towards?|farther|further|away|backwards?|background|rear)\b"
                   r"(?: away| back)?(?: (?:to|from))?(?: (?P<ref>[^,.;]+))?")
VIEWER = re.compile(r"(?:the )?(?:camera|viewer|observer|foreground|front|lens|us|me|you)\b")
SIDEWAYS = re.compile(r"(?:to |the |its )*(?:left|right)|(?:the|a|an|its) ")  # "further to the left", "closer to the wall"


def depth(start: Place, end: Place) -> int:
    """1: nearer to the camera, -1: farther away, 0: neither. The lower edge tells; the size only where the edge stayed,
    since an object that another one covers in part looks smaller."""
    rise = end.bottom - start.bottom
    if abs(rise) > RISE:
        return 1 if rise > 0 else -1
    return (end.area > GROWTH * start.area) - (start.area > GROWTH * end.area)


def directions(text: str, known: Facts, start: Place, end: Place) -> list[tuple[str, bool]]:
    """What `text` says of a move from start to end, and whether it holds: [(words, holds)].

    Beside an object whose place is known ("left of the chair") the object's place counts; else the way that it went.
    """
    closer, farther = depth(start, end) > 0, depth(start, end) < 0
    said = []
    for m in CORNER.finditer(text):
        row, side = m[1] or m[3], m[2] or m[4]
        near = row in ("near", "front", "bottom", "lower")
        said.append((m[0], (end.x < 1 / 3 if side == "left" else end.x > 2 / 3)
                     and (not row or (end.y > 1 / 2 if near else end.y < 1 / 2))))
    text = CORNER.sub("", text)
    for m in BETWEEN.finditer(text):
        one, two = named(m["one"], known), named(m["two"], known)
        xs = [place.x for group in known.others.values() for place in group]
        if one and two:  # the foot of the object on the line of their feet, and not far off it
            a, b, p = (np.array([place.x, place.bottom]) for place in (one, two, end))
            t = (p - a) @ (b - a) / max((b - a) @ (b - a), 1e-9)
            said.append((m[0], 0 < t < 1 and np.linalg.norm(p - a - t * (b - a)) < np.linalg.norm(b - a) / 2))
        elif len(xs) >= 2:
            said.append((m[0], min(xs) <= end.x <= max(xs)))
    for m in BESIDE.finditer(text):
        if other := named(m["ref"], known):
            width = end.box[2] - end.box[0] + other.box[2] - other.box[0]
            said.append((m[0], end.distance(other) < max(start.distance(other), width)))
    for m in SIDE.finditer(text):
        other, sign = named(m["ref"], known), 1 if m[1] == "right" else -1
        said.append((m[0], sign * (end.x - other.x) > 0 if other else sign * (end.x - start.x) > SHIFT))
    for m in FRONT.finditer(text):
        other, front = named(m["ref"], known), m["word"] == "front"
        if other:
            said.append((m[0], end.bottom > other.bottom if front else end.bottom < other.bottom))
        else:
            said.append((m[0], closer if front else farther))
    for m in DEPTH.finditer(text):
        word, ref = m["word"], m["ref"] or ""
        approach = word.startswith(("closer", "nearer", "forward", "foreground", "toward"))
        other = named(ref, known)
        if other and word not in ("foreground", "background", "rear"):
            near = end.distance(other) < start.distance(other)
            said.append((m[0], near == approach))
        elif VIEWER.match(ref) or not (SIDEWAYS.match(ref) or word.startswith("toward")):
            said.append((m[0], closer if approach else farther))
    return said


def check_instruction(answer: str | dict, known: Facts) -> list[str]:
    """Why a sentence cannot be used, empty if it can. answer: the sentence, or a model's whole answer as an object.

    Without masks only the wording is checked. SWAPPED is among the reasons if every statement of direction is wrong and
    would be right for the opposite move.
    """
    text, thing = answer, ""
    if not isinstance(answer, str):
        if not isinstance(answer, dict) or not all(isinstance(answer.get(k), str) for k in ("object", "instruction")):
            return ['it is no JSON object with the texts "object" and "instruction"']
        text, thing = answer["instruction"], answer["object"]
    reasons, found, own = [], words(text), set(words(" ".join(known.names)))
    if re.search(r"[.!?;]\s+\S|\n", text.strip()):
        reasons.append("it is more than one sentence")
    if not 4 <= len(text.split()) <= 30:
        reasons.append(f"it has {len(text.split())} words instead of 4 to 30")
    if not found or found[0] not in VERBS:
        reasons.append(f"it does not begin with one of {', '.join(VERBS)}")
    if banned := [w for w in found if (w in BANNED or w.isdigit()) and w not in own]:
        reasons.append(f"it says {', '.join(sorted(set(banned)))}")
    if not WHERE & set(found):
        reasons.append("it does not say where to")
    for phrase in (text, thing) if thing else (text,):
        if known.names and not any(nouns(name) & {stem(w) for w in words(phrase)} for name in known.names):
            reasons.append(f"the moved object, {known.names[0]}, is not named by that name")
            break
    if thing and clash(thing, " ".join(known.names)):
        reasons.append(f"the moved object, {known.names[0]}, has another colour")
    if known.start:
        lowered = text.lower()
        own_name = next((name for name in (thing.lower(), *known.names) if name and name in lowered), "")
        lowered = lowered.replace(own_name, "it", 1) if own_name else lowered  # "the left shoe" is no direction
        said = directions(lowered, known, known.start, known.end)
        wrong = [claim for claim, holds in said if not holds]
        if said and len(wrong) == len(said) and all(holds for _, holds in directions(lowered, known, known.end, known.start)):
            reasons.append(SWAPPED)
        elif wrong:
            reasons.append("the object did not go there: " + ", ".join(repr(claim) for claim in wrong))
    return reasons


def template(known: Facts) -> str:
    """A sentence made from the masks alone, which passes every check. ValueError without masks or without a visible move."""
    if not known.start:
        raise ValueError("A sentence can be made only from masks that show the object in both pictures; found none.")
    start, end = known.start, known.end
    fit = [n for n in known.names if len(n.split()) <= 8 and not (set(words(n)) & (BANNED | WHERE) or re.search(r"[.!?;,\d]", n))]
    name, dx = (fit or ["object"])[0], end.x - start.x
    near = sorted((end.distance(place), other, place) for other, group in known.others.items() for place in group
                  if len(group) == 1 and other not in known.names)
    if near and abs(gap := end.x - near[0][2].x) > SHIFT and (
            near[0][0] < start.distance(near[0][2]) or gap * (start.x - near[0][2].x) < 0):
        sentence = f"Move the {name} to the {'left' if gap < 0 else 'right'} of the {near[0][1]}."
        if not check_instruction(sentence, known):
            return sentence
    side = f"to the {'left' if dx < 0 else 'right'}" if abs(dx) > SHIFT else ""
    away = {1: "closer to the camera", -1: "farther away from the camera", 0: ""}[depth(start, end)]
    if side and abs(end.bottom - start.bottom) <= SHIFT:
        away = ""
    if not side and not away:
        raise ValueError("The masks show no move that a sentence could tell.")
    return f"Move the {name} {' and '.join(filter(None, (side, away)))}."
