"""Writes instructions for pairs of pictures: a vision-language model is asked, its sentence checked against the masks.

    python data.py instruct pairs.jsonl --out triples.jsonl --url http://localhost:8000/v1 --model Qwen/Qwen3-VL-32B-Instruct

In: triples as JSON lines without instructions; out: the same with them. The paper has Qwen3-VL-32B-Instruct write
SpatialDiff's training sentences and publishes no prompt; prompt and checks here are ours. A sentence that fails a check
is asked for once more with the reasons; when that fails as well, one made from the masks takes its place.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from data import PICTURES, open_image, read_rows, relative, resize, resolve, write_rows
from evaluation import chat
from evaluation.answers import parse_json
from triples.sentences import SWAPPED, Facts, check_instruction, facts, template

VERSION = "move-1"  # of PROMPT: another version asks anew

PROMPT = """\
The two pictures show one scene through a camera that stands still. Exactly one object has been moved from where it is \
in BEFORE to where it is in AFTER; nothing else differs.{hint}

Write the one English sentence that asks an editor, who sees only BEFORE, for the move that leads to AFTER.
- A command of 6 to 20 words that begins with Move, Place, Put, Shift, Slide, Bring or Relocate.
- Call the object by a name that fits no other object in view.
- Give its new place by other visible objects or by the view: to the left of, to the right of, in front of, behind, \
between, next to, closer to the camera, farther away from the camera, in the near left corner and the like. Left and \
right are the viewer's.
- Do not give numbers or coordinates. Do not speak of images, or of before and after. Do not describe the background. \
Do not name a second object to be moved. Do not guess how the object was made ("a 3D model"). The camera does not move.

Answer with one JSON object and nothing else, for example
{{"object": "the blue mug", "relation": "behind", "reference": ["the teapot"], "instruction": "Put the blue mug behind the teapot."}}
{{"object": "the wooden stool", "relation": "closer and right", "reference": [], "instruction": "Slide the wooden stool to the right and closer to the camera."}}"""

RETRY = "\n\nYour earlier answer was rejected: {reasons}. It read: {answer}\nLook again and write another."


def hint(known: Facts) -> str:
    text = f" The moved object is: {known.names[0]}." if known.names else ""
    if known.start:
        boxes = (", ".join(f"{100 * v:.0f}" for v in place.box) for place in (known.start, known.end))
        text += " Its box (left, top, right, bottom in percent of the view, for you alone) is {} in BEFORE and {} in AFTER.".format(*boxes)
    return text


def fitted(path: Path, side: int) -> np.ndarray:
    """The picture, its longer side at most `side`."""
    image = open_image(path)
    H, W = image.shape[:2]
    scale = min(1.0, side / max(H, W))
    return resize(image, max(1, round(H * scale)), max(1, round(W * scale)))


def instruct(jsonl: Path, row: dict, ask, side: int) -> tuple[str | None, str, dict]:
    """One row: (sentence or None, outcome, what to note in its checks). ask(parts, attempt) gives an answer or raises.

    Outcomes: vlm, vlm-retry, template; none when both answers are rejected and no sentence can be made either.
    """
    known = facts(jsonl, row)
    prompt = PROMPT.format(hint=hint(known))
    pictures = ["BEFORE:", fitted(resolve(jsonl, row, "ref"), side), "AFTER:", fitted(resolve(jsonl, row, "tgt"), side)]
    note, rejected, text = {}, [], prompt
    for attempt, outcome in enumerate(("vlm", "vlm-retry")):
        raw = ask([*pictures, text], attempt)
        try:
            answer = parse_json(raw)
            reasons = check_instruction(answer, known)
        except ValueError as error:
            reasons = [str(error)]
        if not reasons:
            return " ".join(answer["instruction"].split()), outcome, note
        rejected.append("; ".join(reasons))
        note = {"rejected": rejected, "swapped": SWAPPED in reasons or note.get("swapped", False)}
        text = prompt + RETRY.format(reasons=rejected[-1], answer=raw[:500])
    try:
        return template(known), "template", note
    except ValueError:
        return None, "none", note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="triples as JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="the new JSON-lines file")
    parser.add_argument("--rewrite", action="store_true", help="also rows that have an instruction")
    parser.add_argument("--side", type=int, default=512, help="pictures are sent with their longer side at most this")
    chat.add_arguments(parser, model="Qwen/Qwen3-VL-32B-Instruct", max_tokens=200, temperature=0.2)


class Unanswered(Exception):
    """In a dry run: the first request of a row that is not in the cache."""


def main(args: argparse.Namespace) -> None:
    """`data.py instruct`. ValueError or OSError with a sentence; exit code 130 after Ctrl-C."""
    if args.side < 32:
        raise ValueError(f"--side must be at least 32, not {args.side}.")
    args.url = args.url or ("http://localhost:8000/v1" if args.dry_run else None)
    cache = args.cache or args.out.with_suffix(".calls.jsonl")
    client = chat.Chat(chat.endpoint_of(args), cache)
    rows = read_rows(args.file, ("id", "ref", "tgt"))
    todo = [row for row in rows if args.rewrite or not row.get("instruction")]
    print(f"{len(rows)} rows, {len(rows) - len(todo)} keep their instruction; {client.endpoint.model}, prompt {VERSION}, answers in {cache}")
    if args.dry_run:
        return dry_run(args, client, todo)

    def work(row):
        try:
            return instruct(args.file, row, lambda parts, attempt: client.ask(parts, VERSION, attempt), args.side)
        except chat.ChatError as error:
            return None, "failed", {"error": str(error)}

    try:
        results = chat.run(todo, work, args.threads, "instruct")
    except KeyboardInterrupt:
        print(f"Stopped. The answers so far are in {cache}; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
    for row, (sentence, outcome, note) in zip(todo, results):
        row["instruction"] = sentence
        kept = {k: v for k, v in row.get("checks", {}).items() if not k.startswith("instruction")}
        row["checks"] = {**kept, "instruction": outcome, "instruction_model": client.endpoint.model,
                         "instruction_prompt": VERSION, **{f"instruction_{k}": v for k, v in note.items()}}
    for row in rows:
        row.update({key: relative(args.out, resolve(args.file, row, key)) for key in PICTURES if row.get(key)})
    write_rows(args.out, rows)
    counts, c = Counter(outcome for _, outcome, _ in results), client.counts
    print(f"accepted at first {counts['vlm']}, after a retry {counts['vlm-retry']}, from the masks {counts['template']}, "
          f"none {counts['none']}, failed {counts['failed']}; swapped and regenerated "
          f"{sum(bool(note.get('swapped')) for *_, note in results)}")
    print(f"answers: {c['asked']} from the server, {c['from_cache']} from the cache; {c['retries']} retries, {c['failed']} calls failed; "
          f"{c['prompt_tokens']} prompt and {c['completion_tokens']} completion tokens")
    if counts["failed"]:
        example = next(note["error"] for _, outcome, note in results if outcome == "failed")
        print(f"{counts['failed']} rows have no instruction because their calls failed ({example}) The same command asks for them again.")
    print(args.out)


def dry_run(args: argparse.Namespace, client: chat.Chat, todo: list[dict]) -> None:
    """What a run would ask now. Bytes are measured on the first requests and scaled up."""
    answered, tokens, sample = [], [], []

    def probe(parts, attempt):
        answer = client.known(parts, VERSION, attempt)
        if answer is not None:
            answered.append(1)
            return answer
        tokens.append(sum(max(1, round(p.shape[0] / 32)) * max(1, round(p.shape[1] / 32)) for p in parts if not isinstance(p, str)))
        if len(sample) < 16:
            sample.append((len(client.body(parts)), parts[-1]))
        raise Unanswered

    def work(row):
        try:
            instruct(args.file, row, probe, args.side)
        except Unanswered:
            pass

    chat.run(todo, work, args.threads, "dry run")
    size = np.mean([n for n, _ in sample]) * len(tokens) if sample else 0
    print(f"{len(tokens)} requests to send, and at most one more for each whose answer is rejected; {len(answered)} are answered already. "
          f"About {size / 1e6:.1f} MB and {sum(tokens)} visual tokens (one for 32 x 32 pixels). Nothing was sent.")
    if sample:
        print(f"\nBEFORE: <picture>\nAFTER: <picture>\n{sample[0][1]}")
