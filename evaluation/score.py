"""Scores of any number of methods on one benchmark: exact metrics, the judge's, their tables and the report."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from data import open_image, resize, resolve, write_rows
from evaluation import chat, metrics, pages, viescore
from evaluation.benchmark import COLUMNS, measure, output_path, read_sample

COPY = "source copy"  # a row of every table: what doing nothing scores
JUDGED = ("SC", "PQ", "O", "O_sample_mean")
NOT_COMPARABLE = ("The paper's own numbers: its judge, its 150 pictures (SpatialBench, not public), quoted. They cannot be "
                  "compared with figures measured on another benchmark or by another judge.")


def interval(triple: tuple[float, float, float]) -> dict[str, float] | None:
    """(mean, low, high) as results.json has it; None for nan."""
    return None if np.isnan(triple[0]) else {key: round(x, 5) for key, x in zip(("mean", "low", "high"), triple)}


def cell(value) -> str:
    """mean [low, high] of an interval, or a text as it is; nothing for None."""
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    digits = 1 if value["high"] > 2 else 3
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table of texts and intervals."""
    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def collect(file: Path, rows: list[dict], outputs: dict[str, Path], depth_model=None, measured: bool = True):
    """Measures every output there is (reads it only, if not `measured`), and the source itself as COPY.

    Returns (records, missing): a record for each (method, id, group, relation, source and picture paths, sha256 of both files, metrics that
    apply), and for each method why the pictures that could not be scored could not: {id: sentence}.
    """
    records, missing = [], {method: {} for method in outputs}
    for done, row in enumerate(rows, 1):
        sample, source = read_sample(file, row), resolve(file, row, "ref")
        paths = {COPY: source} | {method: output_path(folder, row["id"]) for method, folder in outputs.items()}
        for method, path in paths.items():
            try:
                edit = open_image(path)
            except (FileNotFoundError, ValueError) as error:
                missing[method][row["id"]] = str(error)
                continue
            values = measure(edit, sample, depth_model) if measured else {}
            records.append({
                "method": method, "id": row["id"], "group": row.get("group", "all"), "relation": row.get("relation", ""),
                "instruction": row["instruction"], "source": str(source), "picture": str(path),
                "sha256": {"source": sha256(source), "picture": sha256(path)},
                "metrics": {name: value for name, value in values.items() if not np.isnan(value)}})
        print(f"\rmeasured {done}/{len(rows)} ", end="\n" * (done == len(rows)), file=sys.stderr, flush=True)
    return records, missing


def sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def judge(records: list[dict], client: chat.Chat, threads: int, attempts: int, images_first: bool) -> None:
    """Adds `judge` to every record: raw answers, score lists, model, prompt versions."""
    def work(record):
        rating = viescore.judge(client, open_image(record["source"]), open_image(record["picture"]), record["instruction"],
                                attempts, images_first)
        record["judge"] = rating | {"model": client.endpoint.model, "prompts": [viescore.SC_VERSION, viescore.PQ_VERSION]}
    chat.run(records, work, threads, "judged")


def sanity(file: Path, rows: list[dict], client: chat.Chat, threads: int, attempts: int, images_first: bool):
    """`viescore.sanity_verdict` of a judge on rows with truth and masks."""
    def work(job):
        case, row = job
        sample = read_sample(file, row)
        picture = viescore.sanity_pictures(sample)[case]
        return viescore.judge(client, sample.ref, picture, row["instruction"], attempts, images_first)

    jobs = [(case, row) for case in viescore.SANITY for row in rows]
    ratings = chat.run(jobs, work, threads, "judged")
    return viescore.sanity_verdict({case: [r for (c, _), r in zip(jobs, ratings) if c == case] for case in viescore.SANITY})


def warnings(records: list[dict], missing: dict[str, dict[str, str]], total: int) -> list[str]:
    """Sentences on what is left out of the means: outputs that are not there, samples that the judge failed on."""
    found = []
    for method, absent in missing.items():
        if absent:
            found.append(f"{method}: {len(absent)} of {total} outputs are MISSING and left out of its means, so it is measured on "
                         f"other samples than the rest. The first: {next(iter(absent.values()))}")
    for method in (COPY, *missing):
        ratings = [record["judge"] for record in records if record["method"] == method and "judge" in record]
        failed = [rating for rating in ratings if viescore.scores(rating) is None]
        if failed:
            problem = failed[0]["sc"]["problem"] or failed[0]["pq"]["problem"]
            found.append(f"{method}: the judge FAILED on {len(failed)} of {len(ratings)} samples, which are left out of its means. "
                         f"The first: {problem}")
    return found


def unanswered(records: list[dict], client: chat.Chat, images_first: bool) -> int:
    """Calls that `judge` would have to send, unreadable answers aside."""
    keys = set()
    for record in records:
        source, edit = open_image(record["source"]), open_image(record["picture"])
        for parts, version in viescore.requests(source, edit, record["instruction"]).values():
            if client.known(parts, version, images_first=images_first) is None:
                keys.add(client.key(parts, version, images_first=images_first))
    return len(keys)


def summarise(records: list[dict]) -> dict:
    """n, metrics and, if judged, the judge's averages of one method's records: intervals as `interval` gives them."""
    found = {"n": len(records), "metrics": {}}
    for name in COLUMNS:
        values = [record["metrics"][name] for record in records if name in record["metrics"]]
        if values:
            found["metrics"][name] = interval(metrics.bootstrap(values)) | {"n": len(values)}
    if records and "judge" in records[0]:
        means = viescore.summarise([record["judge"] for record in records], [record["group"] for record in records])
        found["judge"] = {key: interval(value) if key in JUDGED else value for key, value in means.items()}
        if not means["n"]:
            found["judge"]["group_means"] = None  # nan is no JSON
    return found


def results(records: list[dict], missing: dict[str, dict[str, str]]) -> dict[str, dict]:
    """method -> `summarise`, with `missing` (ids), and the same by group and by relation."""
    found = {}
    for method in (COPY, *missing):
        mine = [record for record in records if record["method"] == method]
        found[method] = summarise(mine) | {"missing": sorted(missing.get(method, {}))} | {
            f"{key}s": {name: summarise([record for record in mine if record[key] == name])
                        for name in sorted({record[key] for record in mine if record[key]})} for key in ("group", "relation")}
    return found


def method_tables(caption: str, found: dict[str, dict]) -> list[pages.Table]:
    """The judge's means, methods as rows, if there are any; the metrics, methods as columns. n counts outputs; the judge's
    means leave out those that failed, which are counted beside them."""
    made, judged = [], {method: entry["judge"] for method, entry in found.items() if "judge" in entry}
    if judged:
        made.append(pages.Table(f"Judge. {caption}", ["method", "n", "failed", *JUDGED], [
            [method, *map(cell, (found[method]["n"], scores["failed"], *map(scores.get, JUDGED)))] for method, scores in judged.items()]))
    rows = [[name, *(str(count(entry)) for entry in found.values())]
            for name, count in (("outputs", lambda e: e["n"]), ("missing", lambda e: len(e.get("missing", ()))))]
    rows += [[name, *(cell(entry["metrics"].get(name)) for entry in found.values())]
             for name in COLUMNS if any(name in entry["metrics"] for entry in found.values())]
    return [*made, pages.Table(f"Metrics. {caption}", ["metric", *found], rows)]


def tables(found: dict[str, dict]) -> list[pages.Table]:
    """All methods; the same by group where there are several, and GEdit-Bench's means over the groups."""
    made = method_tables("All samples, mean [95 % interval]", found)
    names = sorted({group for entry in found.values() for group in entry["groups"]})
    if len(names) > 1:
        for name in names:
            made += method_tables(f"Group {name}", {
                method: entry["groups"][name] for method, entry in found.items() if name in entry["groups"]})
        means = {method: entry["judge"]["group_means"] for method, entry in found.items() if "judge" in entry}
        means = {method: entry for method, entry in means.items() if entry}
        if means:
            made.append(pages.Table(
                "Judge, means of each group averaged over the groups (as GEdit-Bench)", ["method", "SC", "PQ", "O"],
                [[method, *(f"{x:.3f}" for x in entry.values())] for method, entry in means.items()]))
    return made


def paper_tables() -> list[pages.Table]:
    """The paper's main table and ablation, marked as the paper's."""
    def number(x):
        return "" if x is None else f"{x:.3f}"
    return [
        pages.Table("The paper's table, not measured here", ["method", "SC (GPT-5)", "PQ", "O", "O (Qwen3-VL)"],
                    [[row.method, *map(number, (row.sc, row.pq, row.o, row.qwen_o))] for row in viescore.PAPER],
                    note=NOT_COMPARABLE),
        pages.Table("The paper's ablation, not measured here", ["method", "SC (GPT-5)", "PQ", "O"],
                    [[row.method, *map(number, (row.sc, row.pq, row.o))] for row in viescore.PAPER_ABLATION], note=NOT_COMPARABLE)]


def merit(records: list[dict]) -> str:
    """The measure by which cases are called best and worst: the first of these that any record has."""
    return next(name for name in ("O", "effect_iou", "obj_psnr", "template", "psnr", "")
                if not name or any(value(record, name) is not None for record in records))


def value(record: dict, name: str) -> float | None:
    """A metric of one record, or SC, PQ, O of its judgement; None where there is none."""
    if name not in ("SC", "PQ", "O"):
        return record["metrics"].get(name)
    pair = viescore.scores(record["judge"]) if "judge" in record else None
    return pair and float(dict(zip(("SC", "PQ", "O"), (*pair, viescore.overall(*pair))))[name])


def cases(file: Path, rows: list[dict], records: list[dict], count: int = 3) -> list[pages.Case]:
    """The `count` worst and best outputs of every method by `merit`, with source, edit and the truth if there is one."""
    by_id, name, chosen = {row["id"]: row for row in rows}, merit(records), []
    for method in dict.fromkeys(record["method"] for record in records if record["method"] != COPY):
        ranked = sorted((record for record in records if record["method"] == method and value(record, name) is not None),
                        key=lambda record: value(record, name))
        few = min(count, len(ranked) // 2)
        for kind, part in (("worst", ranked[:few]), ("best", ranked[::-1][:max(few, min(1, len(ranked)))])):
            for record in part:
                source = open_image(record["source"])
                pictures = {"source": source, "edit": resize(open_image(record["picture"]), *source.shape[:2])}
                if truth := resolve(file, by_id[record["id"]], "tgt"):
                    pictures["truth"] = open_image(truth)
                numbers = {key: value(record, key) for key in ("SC", "PQ", "O", *record["metrics"])}
                numbers = {key: f"{number:.3g}" for key, number in numbers.items() if number is not None}
                chosen.append(pages.Case(f"{method}: {record['id']}", record["instruction"], pictures, numbers, kind))
    return chosen


def bars(found: dict[str, dict], name: str) -> list[pages.Bars]:
    """One measure of every method, by relation or, where rows have none, by group."""
    key = "relations" if any(entry["relations"] for entry in found.values()) else "groups"
    labels = sorted({label for entry in found.values() for label in entry[key]})

    def triple(entry, label):
        part = entry[key].get(label, {})
        known = part.get("judge", {}).get(name) if name in JUDGED else part.get("metrics", {}).get(name)
        return known and (known["mean"], known["low"], known["high"])

    series = {method: [triple(entry, label) for label in labels] for method, entry in found.items()}
    counted = [f"{label} ({found[COPY][key][label]['n']})" for label in labels]
    return [pages.Bars(f"{name} by {key[:-1]} (samples)", name, counted, series)] if labels and name else []


def write(folder: Path, file: Path, rows: list[dict], records: list[dict], missing: dict, facts: dict, notes: list[str]) -> dict:
    """scores.jsonl (every record), results.json and report.html in `folder`; returns the results."""
    found = results(records, missing)
    write_rows(folder / "scores.jsonl", records)
    (folder / "results.json").write_text(json.dumps({"facts": facts, "methods": found, "notes": notes}, indent=1))
    pages.report(folder / "report.html", "Evaluation", facts, tables(found) + paper_tables(), bars(found, merit(records)),
                 cases(file, rows, records), notes)
    return found


