"""Edits of rendered scenes, where the truth is exact, beside the baselines that give the numbers meaning."""

import sys
import textwrap
import time
from functools import lru_cache
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import resize, side_by_side
from evaluation import metrics
from evaluation.score import interval
from scenes import Pair, disparity, make_pair

MODEL, CEILING, COPY, AE_SOURCE, SHUFFLED = ROWS = (
    "model", "autoencoder(target)", "source copy", "autoencoder(source)", "shuffled instructions")
COLUMNS = ("success", *metrics.NAMES, *metrics.NAMES_OF_DEPTH)


@lru_cache(320)  # several models measured one after the other see the same scenes
def numbered_pair(level: str, split: str, size: int, seed: int, index: int) -> Pair:
    return make_pair(seed, level, split, size, index=index)


def scene_stream(level: str, split: str, scenes: int, seed: int, size: int):
    """Yields (pair, donor) for every scene; the donor, the scene before (of the first: the last), lends its instruction."""
    donor = numbered_pair(level, split, size, seed, scenes - 1)
    for index in range(scenes):
        pair = numbered_pair(level, split, size, seed, index)
        yield pair, donor
        donor = pair


def names_absent_object(donor, pair) -> bool:
    """Whether the donor's instruction names an object that is not in the pair's scene."""
    named = {donor.scene.objects[i].name for i in (donor.moved, *donor.references)}
    return not named <= {thing.name for thing in pair.scene.objects}


def evaluate(model, level: str, split: str, scenes: int, seed: int, size: int, batch: int, sheet: int,
             baselines: bool = True, ceiling: list[dict] | None = None, **sampling):
    """Edits `scenes` scenes of a split and measures every row; without `baselines` the model and the ceiling alone.

    model: offers edit_and_depth, edit and vae_roundtrip as spatialdiff.Editor does. seed: which scenes; seeds less than
    100 apart share none. ceiling: its metrics, where another model with this autoencoder was measured on these scenes. Memory holds
    the last 320 scenes, and the numbers of all. Returns {row: [metrics of each scene]}, the scenes' relations, the share of
    exchanged instructions that name an absent object, and (pair, edit, metrics) of the first `sheet` scenes.
    """
    values, relations, shown, absent = {row: [] for row in (ROWS if baselines else (MODEL, CEILING))}, [], [], 0
    stream, start = scene_stream(level, split, scenes, seed, size), time.time()
    while chunk := list(islice(stream, batch)):
        pairs = [pair for pair, _ in chunk]
        source, target = (np.stack([getattr(pair, name) for pair in pairs]) for name in ("ref", "tgt"))
        seeds = [pair.seed for pair in pairs]
        edited, depths = model.edit_and_depth(source, [pair.instruction for pair in pairs], seeds=seeds, **sampling)
        edits = {MODEL: edited}
        if ceiling is None:
            edits[CEILING] = model.vae_roundtrip(target)
        if baselines:
            edits |= {
                COPY: source,
                AE_SOURCE: model.vae_roundtrip(source),
                SHUFFLED: model.edit(source, [donor.instruction for _, donor in chunk], seeds=seeds, **sampling),
            }
        for i, (pair, donor) in enumerate(chunk):
            measured = {row: metrics.measure(edit[i], pair) for row, edit in edits.items()}
            if ceiling is not None:
                measured[CEILING] = ceiling[len(relations)]
            if depths is not None:  # of the source copy: what knowing the source's depth alone is worth
                measured[MODEL] |= metrics.measure_depth(resize(depths[i], *pair.ref.shape[:2])[..., 0], pair)
                if baselines:
                    measured[COPY] |= metrics.measure_depth(disparity(pair.ref_depth), pair)
            for row in measured:
                right = metrics.success(measured[row], measured[CEILING]["bg_psnr"])
                values[row].append({"success": right, **measured[row]})
            if len(shown) < sheet:
                shown.append((pair, edits[MODEL][i], values[MODEL][-1]))
            relations.append(pair.relation)
            absent += names_absent_object(donor, pair)
        done, right = len(relations), np.mean([v["success"] for v in values[MODEL]])
        left = (time.time() - start) / done * (scenes - done)
        print(f"\r{split}: {done}/{scenes} scenes, success {right:.3f}, {left / 60:.1f} min left ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return values, relations, absent / scenes, shown


def summarise(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Metric -> mean, low and high of its 95 % interval; a metric that applies to no scene is left out."""
    found = {name: interval(metrics.bootstrap([v[name] for v in values if name in v])) for name in COLUMNS}
    return {name: triple for name, triple in found.items() if triple}


def contact_sheet(shown: list, columns: int = 2) -> np.ndarray:
    """Reference | edit | truth with the instruction below each, as one picture (H, W, 3) uint8."""
    tiles = []
    for pair, edit, value in shown:
        strip = Image.fromarray(side_by_side([pair.ref, edit, pair.tgt]))
        tile = Image.new("RGB", (strip.width + 16, strip.height + 40), "white")
        tile.paste(strip, (8, 2))
        text = f"{pair.instruction} [{'right' if value['success'] else 'wrong'}, IoU {value['effect_iou']:.2f}]"
        lines = "\n".join(textwrap.wrap(text, strip.width // 6))
        ImageDraw.Draw(tile).text((8, strip.height + 4), lines, fill="black", font=ImageFont.load_default(11))
        tiles.append(np.asarray(tile))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])
