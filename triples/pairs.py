"""Triples of your own pairs of pictures, in a folder or listed in a CSV file; pictures stay where they are.

    python data.py pairs --root FOLDER_OR_CSV --out data/mine.jsonl

A CSV file (comma, semicolon or tab) has a header with ref, tgt and, if you like, instruction, mask_ref, mask_tgt, id; its
paths are relative to its folder. A folder has, at any depth, NAME_ref.* and NAME_tgt.* (any kind of picture) and, if you
like, NAME.txt (the instruction), NAME_mask_ref.png and NAME_mask_tgt.png. Masks are black and white, white is the object.
"""

import csv
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from PIL import Image

from data import PICTURES, relative, write_rows


def pair_rows(root: Path, out: Path) -> tuple[list[dict], list[str]]:
    """Rows of the pairs at `root`, and a sentence for each thing that was left out or not understood. FileNotFoundError
    if nothing is there; ValueError for a CSV file without the header, or if no pair is whole."""
    if not root.exists():
        raise FileNotFoundError(f"Expected a folder or a CSV file of pairs at {root}, found nothing.")
    found, remarks = {}, []  # id -> {key: path or instruction}
    if root.is_dir():
        pictures, ambiguous = Image.registered_extensions(), set()
        for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")):
            match = re.fullmatch(r"(.+?)_(mask_ref|mask_tgt|ref|tgt)", path.stem)
            if path.suffix.lower() == ".txt":
                name, key, value = path.stem, "instruction", " ".join(path.read_text("utf-8-sig", "replace").split())
            elif match and path.suffix.lower() in pictures:
                (name, key), value = match.groups(), path
            else:
                remarks.append(f"{path.relative_to(root)}: not of the form NAME_ref.*, NAME_tgt.*, NAME_mask_*.* or NAME.txt.")
                continue
            name = (path.parent / name).relative_to(root).as_posix()
            if key in found.setdefault(name, {}):
                ambiguous.add(name)
                remarks.append(f"{name}: two pictures {name}_{key}.*; the pair is left out.")
            found[name][key] = value
        for name in ambiguous:
            del found[name]
    else:
        text = root.read_text("utf-8-sig", "replace")
        header = text.split("\n")[0]
        lines = csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=header.count))
        columns = [column.strip().lower() for column in next(lines, [])]
        if not {"ref", "tgt"} <= set(columns):
            raise ValueError(f"Expected a header with ref and tgt in {root}, found: {header.strip() or 'nothing'}.")
        if other := set(columns) - {"id", "instruction", *PICTURES[:4]}:
            remarks.append(f"Columns that mean nothing here: {', '.join(sorted(other))}.")
        for cells in lines:
            cells = {column: cell.strip() for column, cell in zip(columns, cells) if cell.strip()}
            if not cells:
                continue
            name = cells.get("id") or Path(cells.get("ref", "")).with_suffix("").as_posix()
            if name in found and "id" not in cells:
                name += f"#{lines.line_num}"  # several edits of one picture
            if name in found:
                remarks.append(f"{root.name}:{lines.line_num}: the id {name!r} is taken; the pair is left out.")
                continue
            found[name] = {key: root.parent / cell if key in PICTURES else cell
                           for key, cell in cells.items() if key in ("instruction", *PICTURES[:4])}
    rows = []
    for name, cells in found.items():
        absent = [key for key in ("ref", "tgt") if key not in cells]
        gone = [f"{value} is missing" for value in cells.values() if isinstance(value, Path) and not value.is_file()]
        if absent or gone:
            remarks.append(f"{name}: {', '.join([f'no {key}' for key in absent] + gone)}; the pair is left out.")
            continue
        paths = {key: relative(out, value) for key, value in cells.items() if isinstance(value, Path)}
        row = {"id": name, **paths, "source": {"kind": "pairs"}}
        if cells.get("instruction"):
            row |= {"instruction": cells["instruction"], "checks": {"instruction": "given"}}
        rows.append(row)
    if not rows:
        raise ValueError("\n".join([f"Expected pairs of pictures in {root}, found none that is whole.", *remarks]))
    return rows, remarks


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, required=True, help="folder or CSV file")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to write")


def main(args: Namespace) -> None:
    rows, remarks = pair_rows(args.root, args.out)
    write_rows(args.out, rows)
    print("\n".join([*remarks, f"{args.out}: {len(rows)} pairs, {sum('instruction' in row for row in rows)} with an "
                     f"instruction, {sum('mask_ref' in row for row in rows)} with masks"]))
