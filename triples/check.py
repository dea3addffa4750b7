"""What a file of triples holds, every problem in it, and a contact sheet.

    python data.py check FILE.jsonl [--sheet sheet.png]

The exit code is 1 if there are problems. A line that does not have the format is an error (exit code 2).
"""

import hashlib
import os
import textwrap
from argparse import ArgumentParser, Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import PICTURES, open_image, read_mask, read_rows, resize, resolve, save_png, side_by_side


def examine(file: Path, row: dict) -> tuple[list[tuple[str, str]], tuple[int, int] | None, str | None]:
    """Problems of one row as (kind, sentence), the reference's (height, width), a hash of what both pictures show."""
    problems, pictures = [], {}
    for key in (key for key in PICTURES if row.get(key)):
        try:
            if key.startswith("mask"):
                pictures[key] = read_mask(file, row, key)
            else:
                pictures[key] = open_image(resolve(file, row, key))
        except FileNotFoundError:
            problems.append(("missing file", f"{key}: {resolve(file, row, key)}"))
        except ValueError as error:
            problems.append(("unreadable picture", f"{key}: {error}"))
    ref, tgt = pictures.get("ref"), pictures.get("tgt")
    for key, picture in pictures.items():
        (H, W), (h, w) = (ref if ref is not None else picture).shape[:2], picture.shape[:2]
        # A mask may be smaller or larger than its picture, but it must show the same view.
        if abs(h * W - w * H) > max(h, w, H, W) if key.startswith("mask") else (h, w) != (H, W):
            problems.append(("sizes differ", f"{key} is {w} x {h}, ref is {W} x {H}"))
        if key.startswith("mask") and not picture.any():
            label = f" with label {row['mask_label']}" if "mask_label" in row else ""
            problems.append(("empty mask", f"{key}: no pixel{label} in {row[key]}"))
    if not row.get("instruction", "").strip():
        problems.append(("no instruction", "none is written yet"))
    if ref is not None and max(ref.shape[:2]) > 2.5 * min(ref.shape[:2]):
        problems.append(("odd aspect ratio", f"{ref.shape[1]} x {ref.shape[0]}; one side is over 2.5 times the other"))
    digest = None
    if ref is not None and tgt is not None:
        if np.array_equal(ref, tgt):
            problems.append(("ref equals tgt", "both pictures show the same"))
        digest = hashlib.sha256(b"".join(str(x.shape).encode() + x.tobytes() for x in (ref, tgt))).hexdigest()
    return problems, None if ref is None else ref.shape[:2], digest


def report(file: Path, rows: list[dict], most: int = 10) -> int:
    """Prints what a file of triples holds and every kind of problem, at most `most` rows of a kind by name (0: all of them).
    Returns the number of problems."""
    problems, sizes, first = {}, Counter(), {}  # kind -> sentences; (h, w) -> rows; content -> id
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for row, (found, size, digest) in zip(rows, threads.map(lambda row: examine(file, row), rows)):
            if digest and first.setdefault(digest, row["id"]) != row["id"]:
                found.append(("duplicate pair", f"the same two pictures as {first[digest]}"))
            for kind, sentence in found:
                problems.setdefault(kind, []).append(f"{row['id']}: {sentence}")
            sizes.update([size] * (size is not None))
    print(f"{file}: {len(rows)} rows, {sum('tgt' in row for row in rows)} with a target, "
          f"{sum('mask_ref' in row or 'mask_tgt' in row for row in rows)} with masks")
    origin = lambda row: " ".join(str(row["source"][key]) for key in ("kind", "task", "level") if key in row.get("source", {}))
    facts = {"source": Counter(map(origin, rows)),
             **{key: Counter(row.get(key, "") for row in rows) for key in ("split", "relation", "group")},
             "written by": Counter(str(row.get("checks", {}).get("instruction", "")) for row in rows),
             "size": Counter({f"{w} x {h}": n for (h, w), n in sizes.items()})}
    for name, counts in facts.items():
        if set(counts) - {""}:
            print(f"{name:13}" + ", ".join(f"{value or 'none'} {n}" for value, n in counts.most_common(12))
                  + f" and {len(counts) - 12} more" * (len(counts) > 12))
    words = sorted(len(row["instruction"].split()) for row in rows if row.get("instruction", "").strip())
    if words:
        print(f"{'instruction':13}{words[0]} to {words[-1]} words, median {words[len(words) // 2]}; "
              f"{len({row['instruction'] for row in rows if row.get('instruction')})} different ones")
    for kind, sentences in problems.items():
        print(f"\n{kind}: {len(sentences)}")
        shown = sentences[:most or None]
        print("\n".join(f"  {sentence}" for sentence in shown))
        if len(shown) < len(sentences):
            print(f"  and {len(sentences) - len(shown)} more; --all names them")
    total = sum(map(len, problems.values()))
    print(f"\n{total or 'no'} problem{'s' * (total != 1)} found")
    return total


def sheet(file: Path, rows: list[dict], height: int = 160) -> np.ndarray:
    """Contact sheet (H, W, 3): ref | tgt | id and instruction for each row, masks outlined, unreadable pictures grey."""
    lines = []
    for row in rows:
        panels = []
        for key, mask_key in (("ref", "mask_ref"), ("tgt", "mask_tgt")):
            try:
                picture = open_image(resolve(file, row, key)) if row.get(key) else np.full((1, 1, 3), 255, np.uint8)
                aspect = min(2, picture.shape[1] / picture.shape[0])
                picture = resize(picture, height, max(1, round(height * aspect)))
                mask = read_mask(file, row, mask_key, picture.shape[:2])
            except (ValueError, OSError):
                picture, mask = np.full((height, height, 3), 128, np.uint8), None
            if mask is not None:
                near = np.pad(mask, 1)
                inner = near[2:, 1:-1] & near[:-2, 1:-1] & near[1:-1, 2:] & near[1:-1, :-2]
                outer = near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]
                picture = picture.copy()
                picture[outer & ~mask], picture[mask & ~inner] = (255, 255, 255), (255, 0, 120)
            panels.append(picture)
        text = Image.new("RGB", (2 * height, height), "white")
        words = "\n".join(textwrap.wrap(row.get("instruction") or "(no instruction)", 40))
        ImageDraw.Draw(text).text((4, 4), f"{row['id'][-44:]}\n\n{words}", fill="black", font=ImageFont.load_default(14))
        lines.append(np.pad(side_by_side([*panels, np.asarray(text)]), ((4, 4), (8, 8), (0, 0)), constant_values=255))
    width = max(line.shape[1] for line in lines)
    return np.concatenate([np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines])


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG to write: rows of the whole file, evenly spaced")
    parser.add_argument("--sheet-rows", type=int, default=24)
    parser.add_argument("--all", action="store_true", help="name every row that has a problem, not ten of a kind")


def main(args: Namespace) -> int:
    rows = read_rows(args.file)
    if args.sheet_rows < 1:
        raise ValueError(f"--sheet-rows must be at least 1, not {args.sheet_rows}.")
    count = report(args.file, rows, 0 if args.all else 10)
    if args.sheet:
        shown = [rows[i * len(rows) // min(len(rows), args.sheet_rows)] for i in range(min(len(rows), args.sheet_rows))]
        save_png(args.sheet, sheet(args.file, shown))
        print(f"{args.sheet}: {len(shown)} of {len(rows)} rows")
    return 1 if count else 0
