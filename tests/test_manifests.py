"""Names, shapes and sizes of every network at full size, on the meta device, against the official files.

    pytest tests/test_manifests.py

tests/data/manifests/*.tsv lists each tensor of an official file: name, shape, dtype; *.index.json is the official index
of a file in shards; keymap_transformer.tsv, made apart from model/weights.py, is its key map row by row.
"""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from model.depth import DEPTH_CONFIGS, DepthAnything
from model.mmdit import MMDiT, MMDiTConfig
from model.text import CLIPConfig, CLIPText, T5Config, T5Encoder
from model.vae import AutoEncoder, VAEConfig
from model.vggt import VGGT, VGGTConfig
from model.weights import DEPTH_HF, FLUX_DIFFUSERS, translate

MANIFESTS = Path(__file__).parent / "data" / "manifests"

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


def read_rows(name):
    lines = (MANIFESTS / f"{name}.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def read_shapes(name):
    return {key: tuple(int(n) for n in shape.split("x")) for key, shape, _ in read_rows(name)}


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes(name):
    build, prefix, key_map, parameters = NETWORKS[name]
    expected = read_shapes(name)

    with torch.device("meta"):
        module = build()
    found = {}
    for ours, tensor in module.state_dict().items():
        theirs = translate(ours, key_map)  # several names share the rows, here equally
        found |= {prefix + key: tuple(part.shape) for key, part in zip(theirs, tensor.chunk(len(theirs)))}
    assert found == expected
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_diffusers_transformer():
    """Through the key map, every tensor of diffusers' files is named once and stacks to ours."""
    expected, named = read_shapes("flux1-kontext-dev.diffusers_transformer"), []
    with torch.device("meta"):
        tensors = MMDiT(MMDiTConfig()).state_dict()
    for name, tensor in tensors.items():
        parts = translate(name, FLUX_DIFFUSERS)
        assert torch.cat([torch.empty(expected[part], device="meta") for part in parts]).shape == tensor.shape, name
        named += parts
    assert len(named) == len(expected) == 1160 and set(named) == set(expected)
    assert sum(math.prod(shape) for shape in expected.values()) == 11_901_408_320


def test_key_map_agrees_with_the_table():
    rows = read_rows("keymap_transformer")
    assert len(rows) == 780
    for ours, theirs, _ in rows:
        assert translate(ours, FLUX_DIFFUSERS) == theirs.split(",")


@pytest.mark.parametrize(
    "name, shards", [("flux1-kontext-dev.diffusers_transformer", [488, 476, 196]), ("t5_xxl_encoder.hf", [113, 106])]
)
def test_index(name, shards):
    index, expected = json.loads((MANIFESTS / f"{name}.index.json").read_text()), read_shapes(name)
    files = [f"-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert index["weight_map"].keys() == expected.keys()
    assert Counter(file[-len(files[0]) :] for file in index["weight_map"].values()) == dict(zip(files, shards))
    assert index["metadata"]["total_size"] == 2 * sum(math.prod(shape) for shape in expected.values())  # bf16
