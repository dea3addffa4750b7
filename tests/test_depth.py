"""Depth Anything V2 against transformers' class, and the rule that makes a disparity picture of its output.

    pytest tests/test_depth.py

tests/data/depth_anything_tiny.safetensors: random weights under the names of the -hf files, inputs, intermediate maps
and outputs of DepthAnythingForDepthEstimation 4.45.2. Errors are relative to the largest reference value; 2e-6, because
a wrong norm epsilon already shows as 4e-6.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import scenes
from model.depth import DEPTH_CONFIGS, DepthAnything, DepthConfig, depth_image, input_size, min_max
from model.vit import ViTConfig, normalize
from model.weights import DEPTH_HF, translate

DATA = Path(__file__).parent / "data"
GOLDEN = load_file(DATA / "depth_anything_tiny.safetensors")
CASES = json.loads((DATA / "depth_anything_tiny.json").read_text())["cases"]
VIT = ViTConfig(image_size=56, width=32, depth=4, heads=2, registers=0, antialias=False)
TINY = DepthConfig(VIT, layers=(0, 1, 2, 3), neck=(8, 12, 16, 20), fusion=16)
SPREAD = DepthConfig(ViTConfig(42, 14, 24, 6, 3, registers=0, antialias=False), (0, 2, 3, 5), (6, 10, 8, 14), 12, head=20)


def close(actual, expected, bound=2e-6):
    assert actual.shape == expected.shape
    relative = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"relative difference {relative:.1e}")  # shown by pytest -s
    assert relative <= bound


def load_hf(config, weights):
    """Our network with the tensors of an -hf file, all of them."""
    with torch.device("meta"):
        model = DepthAnything(config)
    weights = dict(weights)
    ours = {name: torch.cat([weights.pop(key) for key in translate(name, DEPTH_HF)]) for name in model.state_dict()}
    assert not weights
    model.load_state_dict(ours, strict=True, assign=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def depth_anything():
    prefix = "weights."
    return load_hf(TINY, {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)})


@pytest.mark.parametrize("case", CASES)
def test_golden(depth_anything, case):
    pixels = GOLDEN[f"{case}.pixel_values"]
    maps = depth_anything.backbone_maps(pixels)
    reassembled = depth_anything.neck.reassemble(maps)
    fused = depth_anything.neck(maps)
    for i in range(4):
        close(maps[i].flatten(2).mT, GOLDEN[f"{case}.backbone.{i}"][:, 1:])  # the golden ones keep the class token
        close(reassembled[i], GOLDEN[f"{case}.reassemble.{i}"])
        close(fused[i], GOLDEN[f"{case}.fusion.{i}"])
    close(depth_anything.head(fused[-1], pixels.shape[-2:]), GOLDEN[f"{case}.predicted_depth"])


@pytest.mark.parametrize("size", [(42, 42), (28, 70), (126, 98), (14, 56)])
def test_transformers(tmp_path, size):
    """Random weights everywhere, through a file that transformers wrote; grids of odd sides, blocks not all read."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.Dinov2Config(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=6, image_size=42, patch_size=14,
        out_indices=[1, 3, 4, 6], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=24, neck_hidden_sizes=[6, 10, 8, 14], fusion_hidden_size=12,
        head_hidden_size=20,
    )  # fmt: skip
    peer = transformers.DepthAnythingForDepthEstimation(config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for name, p in peer.named_parameters():
        scale = "lambda" in name or name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        p.normal_(1.0 if scale else 0.0, 0.3 if scale else 0.15, generator=g)
    peer.head.conv3.bias.fill_(1.0)
    peer.save_pretrained(tmp_path)
    model = load_hf(SPREAD, load_file(tmp_path / "model.safetensors"))

    images = torch.rand(2, 3, *size, generator=g)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = peer((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).predicted_depth
    assert expected.std() > 0.05 * expected.max()
    close(model(images), expected)


def test_size_not_a_multiple_of_the_patch(depth_anything):
    with pytest.raises(ValueError, match="multiples of 14, found 56 x 60"):
        depth_anything(torch.rand(1, 3, 60, 56))


# The disparity picture


class Stub:
    """Stands for the network: remembers what it was given and answers with `disparity(h, w)`, (B, h, w)."""

    def __init__(self, disparity, image_size=56):
        self.disparity = disparity
        self.config = SimpleNamespace(vit=ViTConfig(image_size=image_size))

    def __call__(self, images):
        self.images = images
        return self.disparity(*images.shape[-2:])


SIZES = {  # picture -> input of the network, height x width
    (512, 512): (518, 518),
    (480, 640): (518, 686),
    (752, 1392): (518, 952),
    (300, 400): (392, 518),
    (640, 480): (686, 518),
    (37, 1000): (14, 518),
    (4, 1000): (14, 518),
}


@pytest.mark.parametrize("size", SIZES)
def test_input_size(size):
    assert input_size(*size, DEPTH_CONFIGS["large"].vit) == SIZES[size]


@pytest.mark.parametrize("size", [(150, 100), (90, 131), (40, 31), (56, 56)])
def test_input_is_that_of_the_hf_processor(size):
    """The processor rounds to 8 bits after its resize, we do not: 0.005 on average. Without antialiasing the difference
    is 0.5 when this noise shrinks and 0.07 when it grows."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.DPTImageProcessor(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = processor(images=picture, return_tensors="pt").pixel_values
    stub = Stub(lambda h, w: torch.zeros(1, h, w))
    depth_image(stub, torch.from_numpy(picture)[None])
    assert stub.images.min() >= 0 and stub.images.max() <= 1
    actual = normalize(stub.images)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().mean() < 0.01


def test_depth_image_is_min_max_of_disparity_at_the_pictures_size():
    """Ramps stay ramps with corners on corners; each picture has its own range; large disparity is near, +1."""

    def ramps(h, w):
        return torch.stack((torch.linspace(0, 160, w).expand(h, w), torch.linspace(7, 2, h)[:, None].expand(h, w)))

    depth = depth_image(Stub(ramps), torch.zeros(2, 150, 100, 3, dtype=torch.uint8))
    assert depth.dtype == torch.float32
    torch.testing.assert_close(depth[0], torch.linspace(-1, 1, 100).expand(150, 100), atol=2e-6, rtol=0)
    torch.testing.assert_close(depth[1], torch.linspace(1, -1, 150)[:, None].expand(150, 100), atol=2e-6, rtol=0)


def test_constant_map_gives_zeros():
    depth = depth_image(Stub(lambda h, w: torch.full((2, h, w), 5.0)), torch.zeros(2, 60, 90, 3, dtype=torch.uint8))
    assert torch.equal(depth, torch.zeros(2, 60, 90))


def test_rendered_depth_follows_the_same_rule():
    z = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) * 9 + 1
    z[2] = 4
    assert torch.equal(min_max(1 / z), torch.from_numpy(np.stack([scenes.disparity(d) for d in z.numpy()])))


@pytest.mark.parametrize("size", [(56, 56), (48, 80), (100, 64)])
def test_depth_image_of_the_network(depth_anything, size):
    images = torch.randint(0, 256, (2, *size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    depth = depth_image(depth_anything, images)
    assert depth.shape == (2, *size) and depth.isfinite().all()
    torch.testing.assert_close(depth.amin((1, 2)), torch.full((2,), -1.0))
    torch.testing.assert_close(depth.amax((1, 2)), torch.full((2,), 1.0))
    if size == (56, 56):  # no resize on the way
        close(depth, min_max(depth_anything(images.permute(0, 3, 1, 2) / 255)))
