"""VGGT aggregator and its DINOv2 stage against tensors made by the official classes.

    pytest tests/test_vggt.py

tests/data/vggt_tiny.safetensors: random weights under the official names, inputs and outputs of the official VGGT
Aggregator. Absolute tolerance 1e-5: a wrong norm epsilon already shows as 3e-5.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.vggt import VGGT, VGGTConfig
from model.vit import ViTConfig, apply_rope_2d, normalize, rope_2d

DATA = Path(__file__).parent / "data"
GOLDEN = load_file(DATA / "vggt_tiny.safetensors")
CASES = json.loads((DATA / "vggt_tiny.json").read_text())["cases"]
CONFIG = VGGTConfig(vit=ViTConfig(image_size=56, width=32, depth=2, heads=2), depth=3, heads=2)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def vggt():
    prefix = "weights.aggregator."
    weights = {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}
    with torch.device("meta"):
        vggt = VGGT(CONFIG)
    vggt.load_state_dict(weights, strict=True, assign=True)
    return vggt.requires_grad_(False)


def test_position_table(vggt):
    close(vggt.patch_embed.position_table(5, 3), GOLDEN["posembed.70x42"])


def test_rope():
    q, positions = GOLDEN["rope.q"], GOLDEN["rope.pos"][0]
    close(apply_rope_2d(q, rope_2d(positions, q.shape[-1], 100.0)), GOLDEN["rope.q_rot"])


@pytest.mark.parametrize("case", CASES)
def test_patch_tokens(vggt, case):
    (tokens,) = vggt.patch_embed(normalize(GOLDEN[f"{case}.images"]).flatten(0, 1))
    close(tokens, GOLDEN[f"{case}.patch_tokens"])


@pytest.mark.parametrize("case", CASES)
def test_aggregator(vggt, case):
    outputs, start = vggt(GOLDEN[f"{case}.images"], layers=range(3))
    assert start == CASES[case]["patch_start_idx"]
    for i, output in enumerate(outputs):
        close(output, GOLDEN[f"{case}.aggregated.{i}"])


def test_chosen_layers(vggt):
    images = GOLDEN["b2s1_56x56.images"]
    (last,), _ = vggt(images[:, 0])
    close(last, GOLDEN["b2s1_56x56.aggregated.2"])
    (last, first), _ = vggt(images, layers=(-1, 0))
    close(last, GOLDEN["b2s1_56x56.aggregated.2"])
    close(first, GOLDEN["b2s1_56x56.aggregated.0"])


def test_size_not_a_multiple_of_the_patch(vggt):
    with pytest.raises(ValueError, match="multiples of 14, found 56 x 60"):
        vggt(torch.rand(1, 3, 60, 56))
