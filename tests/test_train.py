"""Training: resuming is exact, options are refused in sentences, one pair can be learned by heart.

    python -m pytest tests/test_train.py
"""

import gc
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import scenes
import train
from data import save_png, write_rows
from model.text import CLIPText, T5Encoder, build_word_tokenizer
from model.vae import AutoEncoder
from model.vggt import VGGT
from model.weights import read_tensors, save_tensors
from spatialdiff import PRESETS, build, depth_target, encode_geometry, encode_image
from triples.world import SceneTriples

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
    assert "belongs to another run: it differs in recipe." in run("--overfit", "--steps", 3, "--output", tmp_path, "--resume", code=2)


def test_careless_options(tmp_path):
    assert "say what to train" in run(code=2)
    assert "leave --stage out" in run("--overfit", "--stage", 1, code=2)
    assert "--save-every must be at least 1, not 0" in run("--stage", 1, "--save-every", 0, code=2)
    assert "--no-ism is for --stage 2" in run("--stage", 1, "--no-ism", code=2)
    assert "taken from --output" in run("--stage", "base", "--part", "mmdit", "--output", tmp_path, code=2)
    assert "--part is for --stage base" in run("--stage", 1, "--part", "vae", code=2)
    assert "needs --weights" in run("--stage", "base", "--part", "decoder", code=2)
    assert "only levels of --level, plain" in run("--stage", 1, "--mirror", "hard", code=2)
    text = run("--stage", 2, "--weights", tmp_path, "--output", tmp_path, "--shards", 1, "--cache", tmp_path, code=2)
    assert "Stage 2 starts from stage 1's Connector" in text
    assert "stage 2 begins a LoRA" in run("--stage", 2, "--checkpoint", ROOT / "weights/nano/stage2", "--output", tmp_path, code=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Weights of `tiny`, random, a Connector as stage 1 leaves it, and five triples with exact depth."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    for part in ("vae", "t5", "clip", "vggt", "mmdit"):
        save_tensors(folder / f"weights/{part}.safetensors", dict(build(PRESETS["tiny"], part).state_dict()))
    save_tensors(folder / "weights/stage1/connector.safetensors", dict(build(PRESETS["tiny"], "connector").state_dict()))
    build_word_tokenizer(scenes.VOCABULARY).save(str(folder / "weights/tokenizer.json"))
    rows = []
    for i in range(5):
        pair = scenes.make_pair(i, split="train", size=48, extras=False)
        save_png(folder / f"{i}-ref.png", pair.ref)
        save_png(folder / f"{i}-tgt.png", pair.tgt)
        disparity = np.rint((scenes.disparity(pair.tgt_depth) + 1) / 2 * 65535).astype(np.uint16)
        Image.fromarray(disparity).save(folder / f"{i}-depth.png")
        rows.append({"id": str(i), "ref": f"{i}-ref.png", "tgt": f"{i}-tgt.png", "depth_tgt": f"{i}-depth.png", "instruction": pair.instruction})
    write_rows(folder / "rows.jsonl", rows)
    return folder


def on_files(tiny, out, *options, code=0):
    return run("--preset", "tiny", "--weights", tiny / "weights", "--data", tiny / "rows.jsonl", "--batch", 1, "--steps", 12,
               "--cache", out / "cache", "--output", out, *options, code=code)  # fmt: skip


@pytest.mark.parametrize("options", [("--stage", "1"), ("--stage", "2"), ("--stage", "2", "--no-ism")])
def test_cached_encodings_give_the_same_bits(tiny, tmp_path, monkeypatch, options):
    """Losses and weights of twelve steps over five triples, so with reshuffled epochs."""
    on_files(tiny, tmp_path / "live", *options, "--no-cache")
    text = on_files(tiny, tmp_path / "cached", *options)
    assert "to write into" in text and not (tmp_path / "live/cache").exists()
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("live", "cached")]
    for log in logs:
        del log["seconds"]
    assert logs[0] == logs[1] and logs[0]["loss"] > 0 and (logs[0].get("gss", 0) > 0) == (options == ("--stage", "2"))
    live, cached = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("live", "cached"))
    assert live.keys() == cached.keys() and all(torch.equal(live[name], cached[name]) for name in live)
    (tmp_path / "cached/checkpoint.safetensors").unlink()
    assert "to write into" not in on_files(tiny, tmp_path / "cached", *options)  # a second run finds them
    again = load_file(tmp_path / "cached/checkpoint.safetensors")
    assert all(torch.equal(again[name], cached[name]) for name in cached)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_frozen_networks_in_bf16(tiny, tmp_path, monkeypatch, stage):
    """As on a GPU: what learns stays in fp32. From the first step to the sheet."""
    def encode_one(shards, vae, vggt, preset, gss, *rest):
        pair = scenes.make_pair(0, split="train", size=48, extras=False)
        ref, tgt = (torch.from_numpy(picture)[None] for picture in (pair.ref, pair.tgt))
        maps = torch.from_numpy(scenes.disparity(pair.tgt_depth))[None]
        with torch.no_grad():
            return SceneTriples(encode_image(vae, ref), encode_image(vae, tgt), torch.zeros(1, dtype=torch.long), [pair.instruction],
                                encode_geometry(vggt, ref, preset), depth_target(vae, maps, math.isqrt(preset.connector.queries), gss))

    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], cpu_dtype="bfloat16"))
    monkeypatch.setattr(train, "scene_shards", lambda *_: [])
    monkeypatch.setattr(train, "encode_scenes", encode_one)
    argv = ["train.py", "--stage", stage, "--preset", "tiny", "--weights", tiny / "weights", "--steps", 1, "--batch", 1, "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(x) for x in argv])
    train.main()
    assert (tmp_path / "sheet-000001.png").is_file()
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    assert all(x.dtype == torch.float32 for name, x in tensors.items() if name.startswith("param."))
    head = build(PRESETS["tiny"], "spatial_head")  # and without autocast
    assert head(torch.ones(1, 2, head.config.dim, dtype=torch.bfloat16)).dtype == torch.float32


def test_nothing_is_lost(tiny, tmp_path, monkeypatch):
    """Neither a training to one that is begun in its folder or resumed with other networks, nor the log to a kill after
    resuming, nor the weights to a gradient that is not finite."""
    on_files(tiny, tmp_path, "--stage", "1", "--save-every", 6)
    kept = {name: (tmp_path / name).read_bytes() for name in ("checkpoint.safetensors", "log.jsonl", "connector.safetensors")}
    written = (tmp_path / "connector.safetensors").stat().st_mtime_ns
    unchanged = lambda: all((tmp_path / name).read_bytes() == before for name, before in kept.items())
    assert "holds a training already: give --resume" in on_files(tiny, tmp_path, "--stage", "1", code=2) and unchanged()
    other = tmp_path / "weights"
    shutil.copytree(tiny / "weights", other)
    save_tensors(other / "mmdit.safetensors", {k: v + 0.01 for k, v in load_file(other / "mmdit.safetensors").items()})
    assert "it differs in networks" in on_files(tiny, tmp_path, "--stage", "1", "--weights", other, "--resume", code=2) and unchanged()

    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 5}\n{"step": 12}\n{"step": 1')  # the last line torn, as by a full disk
    opened = train.continue_log(log, 6)  # held: closing it would flush it
    assert not opened.closed and log.read_text() == '{"step": 5}\n'
    log.unlink()
    on_files(tiny, tmp_path, "--stage", "1", "--resume")
    assert (tmp_path / "connector.safetensors").stat().st_mtime_ns == written  # not again: a stage 2 knows it by its sha256

    losses = train.losses
    monkeypatch.setattr(train, "losses", lambda *given: tuple(x * torch.nan for x in losses(*given)))
    argv = ["train.py", "--preset", "tiny", "--weights", tiny / "weights", "--data", tiny / "rows.jsonl", "--batch", 1, "--steps", 12,
            "--cache", tmp_path / "cache", "--output", tmp_path / "nan", "--stage", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(x) for x in argv])
    with pytest.raises(ValueError, match="Step 1: the gradient is not finite"):
        train.main()
    assert not (tmp_path / "nan/connector.safetensors").exists()


def test_parts_of_every_checkpoint_are_kept(tiny, tmp_path):
    on_files(tiny, tmp_path, "--stage", "2", "--save-every", 5, "--keep")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000005", "step-000010", "step-000012"]
    for name in ("lora", "connector", "spatial_head"):
        middle, last, result = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("step-000005", "step-000012", ""))
        assert all(torch.equal(last[key], result[key]) for key in result)
        assert any(not torch.equal(middle[key], result[key]) for key in result)
    assert "--keep is for" in run("--stage", "base", "--keep", code=2)


@pytest.mark.parametrize("decoder_only", [True, False])
def test_decoder_alone_leaves_the_latents(tmp_path, monkeypatch, decoder_only):
    """Then the loss depends on no noise, the encoder has no gradient, and it is saved as it was."""
    images = torch.randint(256, (256, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(train, "load_images", lambda shards: (images, images[..., 0].half() / 255))
    vae = build(PRESETS["tiny"], "vae")
    before = {name: x.bfloat16() for name, x in vae.state_dict().items()}
    task = train.VAETask(PRESETS["tiny"], [], vae, torch.device("cpu"), decoder_only)
    first, second = (task.loss(torch.arange(8), torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    assert torch.equal(first, second) == decoder_only
    first.backward()
    assert all((p.grad is None) == (decoder_only and name.startswith("encoder.")) for name, p in vae.named_parameters())
    task.save(tmp_path)
    after = load_file(tmp_path / "vae.safetensors")
    assert all(torch.equal(after[name], x) for name, x in before.items()) == decoder_only


@pytest.mark.parametrize("cached", [True, False])
def test_encoders_leave_memory(tiny, tmp_path, monkeypatch, cached):
    """While training on cached encodings no network that makes them is alive; without a cache they are."""
    alive = []

    def look(task, *rest):
        assert torch.isfinite(task.loss(torch.tensor([0]), torch.Generator().manual_seed(0))[0])
        gc.collect()
        alive.extend(type(x).__name__ for x in gc.get_objects() if type(x) in (T5Encoder, CLIPText, AutoEncoder, VGGT))

    monkeypatch.setattr(train, "train", look)
    argv = ["train.py", "--stage", "2", "--preset", "tiny", "--weights", tiny / "weights", "--data", tiny / "rows.jsonl", "--batch", 1,
            "--cache", tmp_path, "--output", tmp_path / "out", *([] if cached else ["--no-cache"])]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(x) for x in argv])
    gc.collect()
    train.main()
    assert sorted(alive) == ([] if cached else ["AutoEncoder", "CLIPText", "T5Encoder", "VGGT"])


def test_careless_triples(tiny, tmp_path):
    on_files(tiny, tmp_path, "--stage", "2")
    other = tmp_path / "weights"
    shutil.copytree(tiny / "weights", other)
    (tmp_path / "checkpoint.safetensors").unlink()
    save_tensors(other / "vae.safetensors", {k: v + 0.01 for k, v in load_file(other / "vae.safetensors").items()})
    assert "made with vae" in on_files(tiny, tmp_path, "--stage", "2", "--weights", other, code=2)
    assert "found none" in on_files(tiny, tmp_path, "--stage", "2", "--data", tmp_path / "none.jsonl", code=2)
    assert "rendered world" in run("--stage", "base", "--data", tiny / "rows.jsonl", code=2)


@pytest.mark.slow
def test_base_of_two_levels(tiny, tmp_path):
    """Moves come from the first files of each level only; both vocabularies are known; time adds up over resuming; with
    --weights it goes on from these and learns words they do not know."""
    common = ["--stage", "base", "--preset", "tiny", "--level", "plain", "deep", "--shards", 2, "--move-shards", 1, "--steps", 4, "--batch", 4,
              "--cache", tmp_path / "cache", "--output", tmp_path / "out"]  # fmt: skip
    assert "data         4000 samples" in run(*common, "--part", "vae")  # pictures
    run(*common, "--part", "decoder", "--weights", tmp_path / "out", "--output", tmp_path / "decoder")
    before, after = (load_file(tmp_path / folder / "vae.safetensors") for folder in ("out", "decoder"))
    assert {name.split(".")[0] for name, x in before.items() if not torch.equal(x, after[name])} == {"decoder"}
    again = lambda: shutil.rmtree(tmp_path / "out/mmdit")
    assert "data         3000 samples" in run(*common, "--part", "mmdit", "--level", "plain", "deep", "deep")  # deep counts twice
    again()
    assert "data         3000 samples" in run(*common, "--part", "mmdit", "--mirror", "deep")  # and so it does in a mirror
    again()
    assert "data         2000 samples" in run(*common, "--part", "mmdit")  # 4 x 250 other edits, 2 x 500 moves
    vocabulary = lambda folder: json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert {*scenes.vocabulary("plain"), *scenes.vocabulary("deep")} <= set(vocabulary(tmp_path / "out"))
    checkpoint = tmp_path / "out/mmdit/checkpoint.safetensors"
    tensors, metadata = read_tensors(checkpoint)
    save_tensors(checkpoint, tensors, {**metadata, "step": "3", "seconds": "1000.0"})
    run(*common, "--part", "mmdit", "--resume")
    (line,) = (tmp_path / "out/mmdit/log.jsonl").read_text().splitlines()  # step 4, done again
    assert 1000 < json.loads(line)["seconds"] < 1100

    common = [*common, "--part", "mmdit", "--steps", 1, "--weights", tiny / "weights", "--output", tmp_path / "on"]
    (tmp_path / "on").mkdir()
    shutil.copy(tiny / "weights/vae.safetensors", tmp_path / "on")
    assert "one for each of the 2 levels" in run(*common, "--move-shards", 1, 1, 1, code=2)
    assert "data         2500 samples" in run(*common, "--move-shards", 1, 2)
    old, new = vocabulary(tiny / "weights"), vocabulary(tmp_path / "on")
    assert old.items() < new.items() and set(scenes.vocabulary("deep")) <= set(new)
    shutil.rmtree(tmp_path / "on/mmdit")
    run(*common, "--level", "plain", "--rate", 0.5)
    for part in train.LEARNED["mmdit"]:
        before, after = (load_file(folder / f"{part}.safetensors") for folder in (tiny / "weights", tmp_path / "on"))
        assert all(torch.allclose(after[name].float(), x, rtol=0.01, atol=1e-3) for name, x in before.items()), part
        assert any(not torch.equal(after[name], x.bfloat16()) for name, x in before.items()), part
    assert (tmp_path / "on/tokenizer.json").read_text() == (tiny / "weights/tokenizer.json").read_text()
    assert "it differs in networks" in run(*common[:-4], "--weights", tmp_path / "out", "--output", tmp_path / "on", "--level", "plain", "--rate", 0.5,
                                          "--resume", code=2)


@pytest.mark.slow
def test_one_pair_is_learned_by_heart(tmp_path):
    text = run("--overfit", "--output", tmp_path)
    assert "relative L2" in text
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
