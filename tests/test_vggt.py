"""VGGT aggregator and its DINOv2 stage against tensors made by the official classes, the latter also against
transformers' `Dinov2WithRegisters`.

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
from model.vit import ViT, ViTConfig, apply_rope_2d, normalize, rope_2d
from model.weights import DEPTH_HF, translate

DATA = Path(__file__).parent / "data"
GOLDEN = load_file(DATA / "vggt_tiny.safetensors")
CASES = json.loads((DATA / "vggt_tiny.json").read_text())["cases"]
CONFIG = VGGTConfig(vit=ViTConfig(image_size=56, width=32, depth=2, heads=2), depth=3, heads=2)


def close(actual, expected):
    print(f"largest difference {(actual - expected).abs().max():.1e}")  # shown by pytest -s
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


@pytest.mark.parametrize("size", [(42, 42), (28, 70), (126, 98)])
def test_dinov2_of_transformers(tmp_path, size):
    """Random weights everywhere, through a file that transformers wrote; grids of odd sides."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=3, image_size=42, patch_size=14, num_register_tokens=2
    )
    peer = transformers.Dinov2WithRegistersModel(config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for name, p in peer.named_parameters():
        scale = "lambda" in name or name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        p.normal_(1.0 if scale else 0.0, 0.3, generator=g)
    peer.save_pretrained(tmp_path)
    weights = {f"backbone.{key}": value for key, value in load_file(tmp_path / "model.safetensors").items()}

    vit = ViT(ViTConfig(42, 14, 24, 3, 3, registers=2)).requires_grad_(False)
    names = DEPTH_HF | {"backbone.register_tokens": "backbone.embeddings.register_tokens"}
    ours = {name: [weights.pop(key) for key in translate(f"backbone.{name}", names)] for name in vit.state_dict()}
    assert not weights
    vit.load_state_dict({name: torch.cat(parts) for name, parts in ours.items()}, strict=True)

    pixels = torch.randn(2, 3, *size, generator=g)
    (tokens,) = vit(pixels)
    close(tokens, peer(pixels).last_hidden_state[:, 3:])


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
