"""Training: resuming is exact, options are refused in sentences, one pair can be learned by heart.

    python -m pytest tests/test_train.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


def run(*options, code=0):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_resume_is_bit_equal(tmp_path):
    """Stopped after 6 of 12 steps and resumed, against never stopped: weights, optimiser and averages."""
    common = ["--overfit", "--save-every", 3]
    run(*common, "--steps", 12, "--output", tmp_path / "whole", code=1)
    whole = load_file(tmp_path / "whole/checkpoint.safetensors")
    script = (
        "import sys, train; save = train.save_checkpoint\n"
        "def stop(path, step, *rest):\n"
        "    save(path, step, *rest)\n"
        "    if step == 6: raise SystemExit(137)\n"
        "train.save_checkpoint = stop; train.main()"
    )
    options = [*map(str, common), "--steps", "12", "--output", str(tmp_path / "parts")]
    killed = subprocess.run([sys.executable, "-c", script, *options], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 137, killed.stderr
    run(*options, "--resume", code=1)
    parts = load_file(tmp_path / "parts/checkpoint.safetensors")
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_another_run_is_not_resumed(tmp_path):
    run("--overfit", "--steps", 2, "--output", tmp_path, code=1)
    assert "belongs to another run" in run("--overfit", "--steps", 3, "--output", tmp_path, "--resume", code=2)


def test_careless_options(tmp_path):
    assert "say what to train" in run(code=2)
    text = run("--stage", 2, "--weights", tmp_path, "--output", tmp_path, "--shards", 1, "--cache", tmp_path, code=2)
    assert "Stage 2 starts from stage 1's Connector" in text


@pytest.mark.slow
def test_one_pair_is_learned_by_heart(tmp_path):
    text = run("--overfit", "--output", tmp_path)
    assert "relative L2" in text
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
