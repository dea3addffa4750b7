"""Adds up the votes that study pages exported: means, ranks, wins and the voters' agreement."""

import base64
import json
from pathlib import Path

import numpy as np

from evaluation import metrics
from evaluation.score import markdown
from evaluation.study import CRITERIA, FORMAT, SCALE, hash_of


def tally(files: list[str | Path]) -> dict:
    """The result of one study from the vote files of its voters.

    Returns a dict: study, voters, samples (ids), methods, ratings (how many), duplicates (files left out because a later
    file of the same voter is there) and criteria: {H-SC, H-PQ, H-O: {
        means: {method: {mean, low, high, count}}   1..5; 95 % interval by resampling voters and samples together
        ranks: {method: mean rank}                  1 = best, ties share the mean of their ranks
        wins: {method: {other: share}}              rated above the other by the same voter on the same sample; tie = 1/2
        agreement: {kendall_w, samples}             mean over samples that two or more voters rated in full
    }}. Shares and means without any rating are nan. `tally_table` prints it. ValueError, naming the file, for a file that
    is not a vote file, is damaged, or belongs to another study; FileNotFoundError for none.
    """
    if not files:
        raise ValueError("Expected vote files to tally, found none; give the JSON files that the study page exported.")
    votes = [read_votes(Path(file)) for file in files]
    for file, vote in zip(files, votes):
        if vote["study"] != votes[0]["study"]:
            raise ValueError(f"{file} belongs to study {vote['study']}, {files[0]} to {votes[0]['study']}; "
                             "tally the votes of one study at a time.")
    latest, duplicates = {}, []
    for file, vote in sorted(zip(map(str, files), votes), key=lambda pair: pair[1]["saved"]):
        if vote["voter"] in latest:
            duplicates.append(latest[vote["voter"]][0])
        latest[vote["voter"]] = file, vote
    key = votes[0]["opened"]
    methods, samples = key["methods"], key["samples"]
    ratings = np.full((len(latest), len(samples), len(methods), len(CRITERIA)), np.nan)  # (V, S, M, C)
    for v, (_, vote) in enumerate(latest.values()):
        for s, rated in enumerate(vote["ratings"]):
            if rated:
                ratings[v, s, samples[s]["order"]] = np.array(rated, float)
    count = int(np.isfinite(ratings).sum())
    if not count:
        raise ValueError(f"No rating in {', '.join(map(str, files))}; nothing to tally.")
    return {"study": votes[0]["study"], "voters": len(latest), "samples": [sample["id"] for sample in samples],
            "methods": methods, "ratings": count, "duplicates": duplicates,
            "criteria": {name: summarise(ratings[..., c], methods) for c, name in enumerate(CRITERIA)}}


def read_votes(file: Path) -> dict:
    """One exported file, checked to its last number; "opened" is its decoded key."""
    if not file.is_file():
        raise FileNotFoundError(f"Expected a vote file at {file}, found none.")
    try:
        vote = json.loads(file.read_text("utf-8"))
        if not isinstance(vote, dict) or vote.get("format") != FORMAT:
            raise ValueError(f'its format is not "{FORMAT}"')
        if hash_of(vote["key"]) != vote["study"]:
            raise ValueError("its key does not belong to its study")
        vote["opened"] = key = json.loads(base64.b64decode(vote["key"]))
        if not all(isinstance(vote[name], str) and vote[name] for name in ("voter", "saved")):
            raise ValueError("voter or time is missing")
        if len(vote["ratings"]) != len(key["samples"]):
            raise ValueError(f"it rates {len(vote['ratings'])} samples of {len(key['samples'])}")
        for sample, rated in zip(key["samples"], vote["ratings"]):
            if rated is None:
                continue
            if len(rated) != len(key["methods"]) or any(len(row) != len(CRITERIA) for row in rated):
                raise ValueError(f"sample {sample['id']} has not {len(key['methods'])} edits with {len(CRITERIA)} ratings")
            wrong = [x for row in rated for x in row if x is not None and not (type(x) is int and x in SCALE)]
            if wrong:
                raise ValueError(f"sample {sample['id']} is rated {wrong[0]!r}, not 1 to 5")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} is not a whole vote file of a study page: {reason}. Export it again.") from error
    return vote


def summarise(ratings: np.ndarray, methods: list[str]) -> dict:
    """Of ratings (V, S, M) of one criterion, nan where there is none."""
    whole = np.isfinite(ratings).all(-1)  # (V, S)
    ranks = 1 + len(methods) - average_ranks(ratings[whole]) if whole.any() else np.full((1, len(methods)), np.nan)
    means = [metrics.bootstrap_two_ways(ratings[..., m]) for m in range(len(methods))]
    agreement = [kendall_w(ratings[whole[:, s], s]) for s in range(ratings.shape[1]) if whole[:, s].sum() > 1]
    agreement = [w for w in agreement if np.isfinite(w)]

    def share(a: int, b: int) -> float:
        difference = ratings[..., a] - ratings[..., b]
        difference = difference[np.isfinite(difference)]
        return float((np.sign(difference) / 2 + 0.5).mean()) if difference.size else float("nan")

    return {"means": {method: dict(zip(("mean", "low", "high", "count"), found)) for method, found in zip(methods, means)},
            "ranks": dict(zip(methods, ranks.mean(0).tolist())),
            "wins": {a: {b: share(i, j) for j, b in enumerate(methods) if i != j} for i, a in enumerate(methods)},
            "agreement": {"kendall_w": float(np.mean(agreement)) if agreement else float("nan"), "samples": len(agreement)}}


def average_ranks(ratings: np.ndarray) -> np.ndarray:
    """Ranks (..., M) of ratings (..., M), 1 = lowest; tied ones share the mean of their ranks."""
    a, b = ratings[..., :, None], ratings[..., None, :]
    return (a > b).sum(-1) + ((a == b).sum(-1) + 1) / 2


def kendall_w(ratings: np.ndarray) -> float:
    """Kendall's coefficient of concordance of m voters on n methods, ratings (m, n), corrected for ties (Kendall 1970):
    0 no agreement, 1 the same order by all; nan when every voter ties everything."""
    m, n = ratings.shape
    ranks = average_ranks(ratings)
    spread = np.square(ranks.sum(0) - m * (n + 1) / 2).sum()
    same = (ratings[:, :, None] == ratings[:, None, :]).sum(-1)  # size of each entry's tie group
    ties = (np.square(same) - 1).sum()  # sum over groups of t^3 - t
    most = m * m * (n**3 - n) - m * ties
    return float(12 * spread / most) if most else float("nan")


def tally_table(result: dict) -> str:
    """The result of `tally` as Markdown."""
    methods, criteria = result["methods"], result["criteria"]

    def mean(found):
        return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"

    parts = [f"Study {result['study']}: {result['voters']} voters, {len(result['samples'])} samples, {result['ratings']} ratings "
             "from 1 (worst) to 5; mean [95 % interval over voters and samples], mean rank (1 is best)",
             markdown(["method", *(f"{c}{of}" for c in criteria for of in ("", " rank"))],
                      [[m, *(cell for c in criteria.values() for cell in (mean(c["means"][m]), f"{c['ranks'][m]:.2f}"))]
                       for m in methods])]
    for name, found in criteria.items():
        parts.append(markdown([f"{name}: row rated above column", *methods],
                              [[a, *("" if a == b else f"{found['wins'][a][b]:.0%}" for b in methods)] for a in methods]))
    parts.append("Agreement, Kendall's W: " + ", ".join(
        f"{name} {c['agreement']['kendall_w']:.2f} ({c['agreement']['samples']} samples)" for name, c in criteria.items()))
    parts += [f"Left out, the same voter exported later: {file}" for file in result["duplicates"]]
    return "\n\n".join(parts)
