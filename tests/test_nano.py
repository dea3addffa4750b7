"""The shipped miniature: its size, and that it really moves objects.     python -m pytest -m slow tests/test_nano.py"""

from pathlib import Path

import numpy as np
import pytest

from evaluation.world import CEILING, COPY, MODEL, SHUFFLED, evaluate
from spatialdiff import PRESETS, default_folders, load

NANO = PRESETS["nano"]
FOLDER, STAGE2 = default_folders(NANO, None, None)


def test_weights_fit_the_repository():
    assert sum(path.stat().st_size for path in Path(FOLDER).rglob("*") if path.is_file()) <= 25e6


@pytest.mark.slow
@pytest.mark.parametrize("level, split, least, ceiling", [
    ("plain", "seen", 0.82, 0.98), ("plain", "unseen", 0.84, 0.98), ("hard", "seen", 0.42, 0.92), ("hard", "unseen", 0.50, 0.95)])
def test_objects_arrive(level, split, least, ceiling):
    """Bounds are the README's figures less three standard errors of 48 scenes."""
    editor = load(NANO, FOLDER, STAGE2)
    values, *_ = evaluate(editor, level, split, 48, 7, NANO.side, 24, 1, steps=NANO.steps, guidance=1.0)
    rate = {row: np.mean([v["success"] for v in values[row]]) for row in values}
    assert rate[MODEL] >= least and rate[CEILING] >= ceiling and rate[COPY] <= 0.05
    assert rate[SHUFFLED] <= rate[MODEL] / 3
