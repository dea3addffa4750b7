"""Rendered training triples: what is encoded belongs together.     python -m pytest tests/test_encode.py"""

import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import scenes
from data import open_image, read_rows, resize, resolve, save_png, write_rows
from model.text import build_word_tokenizer
from model.weights import read_tensors, save_tensors
from spatialdiff import PRESETS, build, depth_target, encode_geometry, encode_image, find_frozen, load_part
from train import batch_indices
from triples import encode, world
from triples.encode import FileTriples
from triples.world import World, disparity, encode_scenes, load_images, mirror_shards, render_shard

TINY = PRESETS["tiny"]
WORLD = World(size=48, shards=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    paths = [folder / f"{i:04}.safetensors" for i in range(2)]
    patch = pytest.MonkeyPatch()
    patch.setattr(world, "SHARD", 3)
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


def test_fingerprint_depends_on_what_is_rendered(monkeypatch):
    assert World(size=48).fingerprint() == World(size=48, shards=5).fingerprint()
    assert World(size=48).fingerprint() != World(size=64).fingerprint() != World(size=64, moves=1).fingerprint()
    before = World(size=48).fingerprint()
    monkeypatch.setattr(scenes, "STEP", 1.35)  # a rule of the targets alone
    assert World(size=48).fingerprint() != before


def test_batches_are_shuffled_epochs():
    rows = torch.cat([batch_indices(10, 4, i, seed=3) for i in range(10)])
    for epoch in rows.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(rows[:10], rows[10:20])
    assert torch.equal(batch_indices(10, 4, 7, seed=3), rows[28:32])


def test_moves_of_the_first_files_only(shards):
    vae = build(TINY, "vae").eval()
    kinds = ("move", "recolour", "remove", "add", "identity")
    every, few = (encode_scenes(shards, vae, None, TINY, "none", kinds, False, {"vae": "m"}, some) for some in (None, set(shards[:1])))
    assert len(every) == 18 and len(few) == 12  # six scenes with two moves and one other edit each
    assert few.instructions == every.instructions[:9] + every.instructions[11::3]
    assert torch.equal(few.target, torch.cat((every.target[:9], every.target[11::3])))
    assert torch.equal(few.reference[few.root], torch.cat((every.reference[every.root[:9]], every.reference[every.root[11::3]])))


def in_a_mirror(scene: scenes.Scene) -> scenes.Scene:
    objects = tuple(replace(t, a=-t.a, yaw=math.pi - t.yaw) for t in scene.objects)
    return replace(scene, objects=objects, light=replace(scene.light, azimuth=math.pi - scene.light.azimuth))


def test_mirrored_scenes_are_scenes(tmp_path, monkeypatch):
    """Pictures and depth are those of the scene with everything on its other side, and its words put things there."""
    monkeypatch.setattr(world, "SHARD", 6)
    render_shard((World("hard", 128), 0, tmp_path / "0000.safetensors"))
    (path,) = mirror_shards([tmp_path / "0000.safetensors"])
    assert mirror_shards([tmp_path / "0000.safetensors"]) == [path]
    tensors, metadata = read_tensors(path)
    words, sides = iter(json.loads(metadata["edits"])), 0
    for i in range(6):
        scene, edits = scenes.training_edits(i, "hard", 2, 1)
        truth, row = in_a_mirror(scene), i * 3
        pictures = [(tensors["ref"][i], tensors["ref_depth"][i], truth)]
        pictures += [(tensors["tgt"][row + k], tensors["tgt_depth"][row + k], in_a_mirror(e.target)) for k, e in enumerate(edits)]
        for picture, depth, expected in pictures:
            drawn = scenes.render(expected, 128)
            things = drawn.ids >= 0  # floors have a pattern, which is not mirrored
            assert (np.abs(drawn.depth - depth.float().numpy()) < 0.02).mean() > 0.995
            assert (np.abs(drawn.rgb.astype(int) - picture.numpy())[things] < 8).mean() > 0.9  # all but edges
        for edit in edits:
            kind, relation, instruction = next(words)
            swap = lambda text: " ".join({"left": "right", "right": "left"}.get(w, w) for w in scenes.words_of(text))
            assert scenes.words_of(instruction) == swap(edit.instruction).split() and relation == swap(edit.relation)
            sides += instruction != edit.instruction
            if kind == "move":
                place = scenes.target_place(truth, relation, edit.moved, edit.references)
                moved = edit.target.objects[edit.moved]
                assert np.allclose(place, (-moved.a, moved.b, moved.z))
    assert sides >= 3


# Triples of files


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Every part of `tiny`, random, and a Connector as stage 1 leaves it."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for part in ("vae", "t5", "clip", "vggt", "mmdit"):
        save_tensors(folder / f"{part}.safetensors", {k: v.contiguous() for k, v in build(TINY, part).state_dict().items()})
    save_tensors(folder / "stage1/connector.safetensors", dict(build(TINY, "connector").state_dict()), {"preset": "tiny"})
    build_word_tokenizer(scenes.VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def rows(tmp_path):
    """Seven triples of three sizes; all have an exact depth of their own."""
    made = []
    for i in range(7):
        pair = scenes.make_pair(i, split="train", size=(48, 64, 41)[i % 3], extras=False)
        names = {key: f"pictures/{i}-{key}.png" for key in ("ref", "tgt", "depth_tgt")}
        save_png(tmp_path / names["ref"], pair.ref)
        save_png(tmp_path / names["tgt"], pair.tgt)
        disparity = (scenes.disparity(pair.tgt_depth) + 1) / 2 * 65535
        Image.fromarray(disparity.round().astype(np.uint16)).save(tmp_path / names["depth_tgt"])
        made.append({"id": str(i), "instruction": pair.instruction, **names})
    write_rows(tmp_path / "rows.jsonl", made)
    return tmp_path / "rows.jsonl"


def triples(rows, weights, cache, gss="lds", preset=TINY):
    sources = find_frozen(preset, weights, ("t5", "clip", "vae", "vggt"))
    return FileTriples(rows, preset, sources, weights, gss, torch.device("cpu"), torch.float32, cache)


def tensors(batch):
    return [*batch.text, batch.reference, batch.target, batch.geometry, *([] if batch.depth is None else [batch.depth])]


@pytest.mark.parametrize("gss", ["lds", "eds", "none"])
def test_cached_equals_uncached_in_shuffled_epochs(rows, weights, tmp_path, gss):
    live, cached = triples(rows, weights, None, gss), triples(rows, weights, tmp_path / "cache", gss)
    truth = read_rows(rows)
    vae, vggt = (load_part(TINY, live.sources[part]) for part in ("vae", "vggt"))
    for epoch in range(2):
        order = torch.cat([batch_indices(7, 1, 7 * epoch + i, seed=3) for i in range(7)])
        assert sorted(order.tolist()) == list(range(7))
        for i in order:
            a, b = live.batch(i[None]), cached.batch(i[None])
            assert a.instructions == b.instructions == [truth[i]["instruction"]]
            for x, y in zip(tensors(a), tensors(b), strict=True):
                assert x.dtype == y.dtype and torch.equal(x, y)
            for key, latent in (("ref", b.reference), ("tgt", b.target)):
                picture = resize(open_image(resolve(rows, truth[i], key)), 48, 48)
                picture = torch.from_numpy(picture)[None]
                assert torch.equal(latent, encode_image(vae, picture))
                assert torch.equal(b.geometry, encode_geometry(vggt, picture, TINY)) == (key == "ref")
    assert (live.mean_depth() is None) == (gss == "none")
    if gss != "none":
        depths = torch.stack([live.batch(torch.tensor([i])).depth for i in range(7)])
        assert torch.equal(live.mean_depth(), cached.mean_depth())
        torch.testing.assert_close(live.mean_depth(), depths.mean(dim=(0, 1, 2)))
    together, alone = cached.batch(torch.tensor([4, 1])), [cached.batch(torch.tensor([i])) for i in (4, 1)]
    for x, *parts in zip(tensors(together), *map(tensors, alone)):
        assert torch.equal(x, torch.cat(parts))


def test_depth_target_is_the_exact_one(rows, weights, tmp_path):
    pair = scenes.make_pair(3, split="train", size=48, extras=False)
    found = triples(rows, weights, tmp_path / "cache", "eds").batch(torch.tensor([3])).depth
    expected = depth_target(None, torch.from_numpy(scenes.disparity(pair.tgt_depth))[None], 3, "eds")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)  # 16 bits


class Teacher(str):
    digest = lambda self: self


def test_depth_anything_where_no_depth_is_given(rows, weights, tmp_path, monkeypatch):
    asked = []
    write_rows(rows, [{k: v for k, v in row.items() if k != "depth_tgt" or row["id"] == "0"} for row in read_rows(rows)])
    with pytest.raises(FileNotFoundError, match="Depth-Anything-V2"):
        triples(rows, weights, tmp_path / "cache", "eds")
    assert not (tmp_path / "cache").exists()  # nothing was encoded in vain
    monkeypatch.setattr(encode, "find_depth", lambda folder: (None, Teacher("one")))
    monkeypatch.setattr(encode, "load_depth", lambda folder, device: asked.append(folder) or "teacher")
    monkeypatch.setattr(encode, "depth_image", lambda model, images: images.float().mean(dim=-1) / 127.5 - 1)
    found = triples(rows, weights, tmp_path / "cache", "eds").batch(torch.tensor([1])).depth
    picture = torch.from_numpy(resize(open_image(rows.parent / "pictures/1-tgt.png"), 48, 48))
    assert asked == [weights]
    monkeypatch.setattr(encode, "find_depth", lambda folder: (None, Teacher("another")))
    with pytest.raises(ValueError, match="made with depth one; this run has depth another"):
        triples(rows, weights, tmp_path / "cache", "eds")
    torch.testing.assert_close(found, depth_target(None, picture.float().mean(dim=-1)[None] / 127.5 - 1, 3, "eds"))


def test_order_and_names_of_the_rows_do_not_matter(rows, weights, tmp_path, capsys):
    first = triples(rows, weights, tmp_path / "cache")
    renamed = [row | {"id": f"other {row['id']}"} for row in reversed(read_rows(rows))]
    write_rows(rows, renamed)
    capsys.readouterr()
    again = triples(rows, weights, tmp_path / "cache")
    assert "encod" not in capsys.readouterr().out
    for x, y in zip(tensors(first.batch(torch.tensor([2]))), tensors(again.batch(torch.tensor([4])))):
        assert torch.equal(x, y)


def test_a_changed_picture_is_encoded_again(rows, weights, tmp_path):
    before = triples(rows, weights, tmp_path / "cache").batch(torch.tensor([0]))
    save_png(rows.parent / "pictures/0-tgt.png", 255 - open_image(rows.parent / "pictures/0-tgt.png"))
    encode._digests.clear()  # a new run
    after = triples(rows, weights, tmp_path / "cache").batch(torch.tensor([0]))
    assert torch.equal(before.reference, after.reference) and not torch.equal(before.target, after.target)


def test_size_is_said_before_it_is_written(rows, weights, tmp_path, capsys, monkeypatch):
    triples(rows, weights, tmp_path / "cache")
    said = float(re.search(r": ([\d.]+) MB to write", capsys.readouterr().out)[1])
    files = [load_file(path) for path in (tmp_path / "cache").glob("*.safetensors")]
    assert said == round(sum(x.nbytes for file in files for x in file.values()) / 1e6, 2) > 0
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="on a larger disk"):
        triples(rows, weights, tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.safetensors"))


@pytest.mark.parametrize("change, words", [
    ("vae", r"latent\) made with vae \w+; this run has vae"),
    ("t5", r"text\) made with t5 \w+; this run has t5"),
    ("side", "made with side 48; this run has side 64"),
])  # fmt: skip
def test_cache_of_other_weights_or_sizes_is_refused(rows, weights, tmp_path, change, words):
    triples(rows, weights, tmp_path / "cache")
    folder, preset = weights, TINY
    if change == "side":
        preset = replace(TINY, side=64)
    else:
        folder = tmp_path / "other"
        shutil.copytree(weights, folder)
        network = {k: v + 0.01 for k, v in load_file(folder / f"{change}.safetensors").items()}
        save_tensors(folder / f"{change}.safetensors", network)
    with pytest.raises(ValueError, match=words):
        triples(rows, folder, tmp_path / "cache", preset=preset)


def test_interrupted_writing_loses_nothing(rows, weights, tmp_path, monkeypatch):
    made = []

    def stop(vae, images):
        made.append(1)
        if len(made) == 5:
            raise KeyboardInterrupt
        return encode_image(vae, images)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_image", stop)
        with pytest.raises(KeyboardInterrupt):
            triples(rows, weights, tmp_path / "cache")
    made.clear()
    monkeypatch.setattr(encode, "encode_image", lambda vae, images: made.append(1) or encode_image(vae, images))
    triples(rows, weights, tmp_path / "cache")
    assert len(made) == 1 + 14 - 3  # on the meta device for the size; of 7 references and 7 targets three were kept


def test_rows_that_cannot_be_trained_on(rows, weights, tmp_path):
    whole = read_rows(rows)
    for key, words in (("tgt", "picture after the edit"), ("instruction", "data.py instruct")):
        write_rows(rows, [{k: v for k, v in row.items() if k != key or row["id"] != "5"} for row in whole])
        with pytest.raises(ValueError, match=f"1 of 7 have none, the first is 5.*{words}"):
            triples(rows, weights, None)


@pytest.mark.parametrize("file, content, words", [
    ("2-ref.png", None, "Expected the ref of 2 at .*found no file"), ("2-tgt.png", None, "Expected the tgt of 2"),
    ("2-depth_tgt.png", None, "Expected the depth_tgt of 2"), ("2-ref.png", b"no picture", "ref of 2, .*cannot be read"),
    ("2-tgt.png", b"no picture", "2-tgt.png, found a file that cannot be read"), ("2-depth_tgt.png", b"no picture", "picture of depth at"),
    ("2-depth_tgt.png", "RGB", "16-bit grey values .*found a picture of mode RGB"),
])  # fmt: skip
def test_missing_and_damaged_pictures(rows, weights, tmp_path, file, content, words):
    path = rows.parent / "pictures" / file
    path.unlink()
    if content == "RGB":
        Image.new("RGB", (48, 48)).save(path)
    elif content:
        path.write_bytes(content)
    encode._digests.clear()
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        triples(rows, weights, tmp_path / "cache")


def test_words_that_the_miniature_lacks(rows, weights):
    write_rows(rows, [row | {"instruction": "Move the armchair left of the red cube."} for row in read_rows(rows)])
    with pytest.raises(ValueError, match="does not know 1 words .*armchair"):
        triples(rows, weights, None)


def test_pictures_of_two_sizes_in_one_batch(rows, weights, tmp_path):
    wide = replace(TINY, keep_aspect=True)
    save_png(rows.parent / "pictures/0-ref.png", np.zeros((40, 80, 3), np.uint8))
    found = triples(rows, weights, tmp_path / "cache", preset=wide)
    assert found.batch(torch.tensor([0])).grid == (2, 4)
    with pytest.raises(ValueError, match="--micro 1"):
        found.batch(torch.tensor([0, 1]))


def test_a_picture_on_its_side(rows, weights):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (80, 40)).save(rows.parent / "pictures/0-ref.jpg", exif=exif)
    write_rows(rows, [row | {"ref": "pictures/0-ref.jpg"} for row in read_rows(rows)])
    assert triples(rows, weights, None, preset=replace(TINY, keep_aspect=True)).batch(torch.tensor([0])).grid == (4, 2)
