"""Names, shapes and sizes of every network at full size, on the meta device, against the official files.

    pytest tests/test_manifests.py

tests/data/manifests/*.tsv lists each tensor of an official file: name, shape, dtype.
"""

from pathlib import Path

import pytest
import torch

from model.depth import DEPTH_CONFIGS, DepthAnything
from model.mmdit import MMDiT, MMDiTConfig
from model.text import CLIPConfig, CLIPText, T5Config, T5Encoder
from model.vae import AutoEncoder, VAEConfig
from model.vggt import VGGT, VGGTConfig
from model.weights import DEPTH_HF, translate

NETWORKS = {  # manifest: (constructor, prefix in the file, key map, parameters)
    "flux1-kontext-dev.bfl": (lambda: MMDiT(MMDiTConfig()), "", {}, 11_901_408_320),
    "vggt-1b": (lambda: VGGT(VGGTConfig()), "aggregator.", {}, 909_112_320),
    "ae.bfl": (lambda: AutoEncoder(VAEConfig()), "", {}, 83_819_683),
    "t5_xxl_encoder.hf": (lambda: T5Encoder(T5Config()), "", {}, 4_762_310_656),
    "clip_l.hf": (lambda: CLIPText(CLIPConfig()), "", {}, 123_060_480),
    "depth-anything-v2-small-hf": (lambda: DepthAnything(DEPTH_CONFIGS["small"]), "", DEPTH_HF, 24_785_089),
    "depth-anything-v2-base-hf": (lambda: DepthAnything(DEPTH_CONFIGS["base"]), "", DEPTH_HF, 97_470_785),
    "depth-anything-v2-large-hf": (lambda: DepthAnything(DEPTH_CONFIGS["large"]), "", DEPTH_HF, 335_315_649),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes(name):
    build, prefix, key_map, parameters = NETWORKS[name]
    path = Path(__file__).parent / "data" / "manifests" / f"{name}.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    expected = {key: tuple(int(n) for n in shape.split("x")) for key, shape, _ in rows}

    with torch.device("meta"):
        module = build()
    found = {}
    for ours, tensor in module.state_dict().items():
        theirs = translate(ours, key_map)  # several names share the rows, here equally
        found |= {prefix + key: tuple(part.shape) for key, part in zip(theirs, tensor.chunk(len(theirs)))}
    assert found == expected
    assert sum(p.numel() for p in module.parameters()) == parameters
