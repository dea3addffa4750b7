"""Rendered training triples: what is encoded belongs together.     python -m pytest tests/test_encode.py"""

import numpy as np
import pytest
import torch

import scenes
from triples import encode
from triples.encode import World, disparity, encode_scenes, load_images, render_shard
from spatialdiff import PRESETS, build, depth_target, encode_geometry, encode_image
from train import batch_indices

TINY = PRESETS["tiny"]
WORLD = World(size=48, shards=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    paths = [folder / f"{i:04}.safetensors" for i in range(2)]
    patch = pytest.MonkeyPatch()
    patch.setattr(encode, "SHARD", 3)
    for i, path in enumerate(paths):
        render_shard((WORLD, i, path))
    patch.undo()
    return paths


def test_triples_belong_together(shards, tmp_path):
    torch.manual_seed(0)
    vae, vggt = build(TINY, "vae").eval(), build(TINY, "vggt").eval()
    hashes = {"vae": "a", "vggt": "b"}
    triples = encode_scenes(shards, vae, vggt, TINY, "lds", ("move",), False, hashes)
    other = build(TINY, "vae")
    again = encode_scenes(shards, other, vggt, TINY, "lds", ("move",), False, hashes)  # read back, not encoded
    changed = encode_scenes(shards, other, vggt, TINY, "lds", ("move",), False, hashes | {"vae": "c"})
    assert not torch.equal(changed.target, triples.target) and torch.equal(changed.geometry, triples.geometry)
    truth = [
        (scene, edit)
        for seed in range(6)
        for scene, edits in [scenes.training_edits(seed, "plain", 2, 1)]
        for edit in edits
        if edit.kind == "move"
    ]
    assert len(truth) == len(triples.target) == 12
    for i in torch.randperm(12).tolist():
        scene, edit = truth[i]
        ref, tgt = scenes.render(scene, 48), scenes.render(edit.target, 48)
        assert triples.instructions[i] == again.instructions[i] == edit.instruction
        root = triples.root[i]
        with torch.no_grad():
            pairs = [
                (triples.reference[root], encode_image(vae, torch.from_numpy(ref.rgb)[None])[0]),
                (triples.target[i], encode_image(vae, torch.from_numpy(tgt.rgb)[None])[0]),
                (triples.geometry[root], encode_geometry(vggt, torch.from_numpy(ref.rgb)[None], TINY)[0]),
                (triples.depth[i], depth_target(vae, disparity(torch.from_numpy(tgt.depth)[None]), 3, "lds")[0]),
            ]
        for stored, fresh in pairs:
            assert torch.allclose(stored.float(), fresh, atol=2e-2, rtol=2e-3)  # stored in fp16
        assert torch.equal(triples.target[i], again.target[i])


def test_disparity_is_the_scenes_rule(shards):
    images, maps = load_images(shards)
    _, depths = load_images(shards, raw_depth=True)
    assert images.shape == (24, 48, 48, 3) and maps.shape == (24, 48, 48)
    inverse = 1 / depths[5].double().numpy()
    expected = 2 * (inverse - inverse.min()) / (inverse.max() - inverse.min()) - 1
    assert np.abs(maps[5].double().numpy() - expected).max() < 2e-3
    assert maps[5][depths[5] == depths[5].min()].min() == 1


def test_fingerprint_depends_on_what_is_rendered():
    assert World(size=48).fingerprint() == World(size=48, shards=5).fingerprint()
    assert World(size=48).fingerprint() != World(size=64).fingerprint() != World(size=64, moves=1).fingerprint()


def test_batches_are_shuffled_epochs():
    rows = torch.cat([batch_indices(10, 4, i, seed=3) for i in range(10)])
    for epoch in rows.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(rows[:10], rows[10:20])
    assert torch.equal(batch_indices(10, 4, 7, seed=3), rows[28:32])
