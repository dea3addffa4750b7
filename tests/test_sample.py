"""sample.py: the staged edit equals the plain one; what careless use is answered with.

    pytest tests/test_sample.py

The networks are those of the preset `tiny`, random.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
from data import open_image, resize
from model import lora
from model.text import build_word_tokenizer
from model.weights import FLUX_DIFFUSERS, VAE_DIFFUSERS, save_tensors, translate
from scenes import VOCABULARY, make_pair
from spatialdiff import PARTS, PRESETS, build, choose_preset, load

ROOT = Path(__file__).parent.parent
PROMPT = "move the red cube to the left of the blue sphere"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Every part of `tiny` with random weights large enough that each of them changes the picture."""
    folder, generator = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    for part in PARTS:
        module = build(PRESETS["tiny"], part)
        for parameter in module.parameters():
            parameter.data.normal_(std=max(parameter[0].numel(), 20) ** -0.5, generator=generator)
        place = folder / "stage2" if part in ("connector", "spatial_head") else folder
        save_tensors(place / f"{part}.safetensors", module.state_dict())
    build_word_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run(weights, monkeypatch, tmp_path):
    """Runs sample.py's main with `tiny` and these options, in an empty folder; returns it."""

    def run(*options, weights=weights):
        argv = ["sample.py", "--preset", "tiny", "--weights", weights, "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        monkeypatch.chdir(tmp_path)
        sample.main()
        return tmp_path

    return run


@pytest.fixture
def refused(run, capsys):
    """The sentence that these options are refused with."""

    def refused(*options, **keywords):
        with pytest.raises(SystemExit) as exit:
            run(*options, **keywords)
        sentence = capsys.readouterr().err
        assert exit.value.code == 2 and sentence.count("\n") == 1
        return sentence

    return refused


@pytest.fixture
def picture(tmp_path):
    """A rendered scene stretched to 70 x 50 pixels, in a file."""
    path = tmp_path / "x.png"
    Image.fromarray(resize(make_pair(3, size=64, index=0, extras=False).ref, 50, 70)).save(path)
    return path


def test_no_options_from_a_shell(weights, tmp_path):
    command = [sys.executable, ROOT / "sample.py", "--preset", "tiny", "--weights", weights]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    pair = make_pair(0, size=48, index=0)
    assert pair.instruction in done.stdout
    with Image.open(tmp_path / "edit.png") as image:
        assert image.size == (48, 48)
        assert (image.text["prompt"], image.text["preset"]) == (pair.instruction, "tiny")
        assert (image.text["seed"], image.text["steps"]) == ("0", "8")
        assert len(image.text["weights_sha256"]) == 64
    sheet = open_image(tmp_path / "edit_compare.png")  # reference, edit, truth
    assert np.array_equal(sheet[:, :48], pair.ref) and np.array_equal(sheet[:, -48:], pair.tgt)


def test_scene_of_another_level(run):
    folder = run("--level", "textured", "--seed", 1)
    assert np.array_equal(open_image(folder / "edit_compare.png")[:, :48], make_pair(1, "textured", size=48, index=0).ref)


def test_no_traceback_in_a_shell(weights, tmp_path):
    command = [sys.executable, ROOT / "sample.py", "--weights", tmp_path / "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("Expected weights at") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("ism", [True, False])
def test_staged_edit_equals_the_plain_one(run, weights, picture, ism):
    options = ["--image", picture, "--prompt", PROMPT, "--seed", 5, "--steps", 3]
    folder = run(*options, *([] if ism else ["--no-ism"]))
    editor = load(PRESETS["tiny"], weights, weights / "stage2", ism=ism)
    small = resize(open_image(picture), 48, 48)
    edit = editor.edit(small[None], [PROMPT], [5], 3, PRESETS["tiny"].guidance_sample)
    assert np.array_equal(open_image(folder / "edit.png"), resize(edit[0], 50, 70))
    assert not (folder / "edit_compare.png").exists()
    if ism:  # geometry of zeros is another edit
        assert not np.array_equal(edit, editor.edit(small[None], [PROMPT], [5], 3, alter_geometry=torch.zeros_like))


def test_published_arrangement(run, weights, picture, capsys):
    """The transformer and the autoencoder in diffusers' names, shards, the repository's folders, VGGT in its own file with
    heads: the preset is recognised and the edit is the same, pixel for pixel."""
    options = ["--image", picture, "--prompt", PROMPT, "--steps", 2]
    run(*options)
    expected = open_image(picture.parent / "edit.png")
    hub = picture.parent / "hub"
    for part, key_map, place in (("mmdit", FLUX_DIFFUSERS, "transformer/diffusion_pytorch_model-{:05}-of-00002.safetensors"),
                                 ("vae", VAE_DIFFUSERS, "vae/diffusion_pytorch_model.safetensors"),
                                 ("t5", {}, "text_encoder_2/model-{:05}-of-00002.safetensors"),
                                 ("clip", {}, "text_encoder/model.safetensors"), ("vggt", {}, "vggt/model.safetensors")):
        tensors = {}
        for name, tensor in load_file(weights / f"{part}.safetensors").items():
            theirs = translate(name, key_map)
            tensor = tensor.roll(len(tensor) // 2, 0) if theirs[0].startswith("norm_out.linear.") else tensor
            rows = [48] * (len(theirs) - 1)
            tensors |= zip(theirs, tensor.split([*rows, len(tensor) - sum(rows)]))
        if part == "vggt":
            tensors = {f"aggregator.{name}": tensor for name, tensor in tensors.items()} | {"depth_head.x": torch.zeros(2)}
        shards = 2 if "{" in place else 1
        for i in range(shards):
            save_tensors(hub / place.format(i + 1), dict(list(tensors.items())[i::shards]))
    (hub / "tokenizer").mkdir()
    (hub / "tokenizer" / "tokenizer.json").write_bytes((weights / "tokenizer.json").read_bytes())
    capsys.readouterr()
    argv = ["sample.py", "--weights", hub, "--checkpoint", weights / "stage2", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(a) for a in argv])
        sample.main()
        printed = capsys.readouterr().out
        assert "preset tiny: SpatialDiff" in printed and "hub/transformer/*.safetensors (diffusers names, F32)" in printed
        assert np.array_equal(open_image(picture.parent / "edit.png"), expected)
        (hub / "vggt/model.safetensors").unlink()  # plain Kontext needs none
        patch.setattr(sys, "argv", [str(a) for a in argv[:3] + argv[5:]])
        sample.main()
        assert "preset tiny: plain FLUX Kontext, the paper's baseline" in capsys.readouterr().out
    run(*options, "--no-ism", "--output", "without.png")
    assert np.array_equal(open_image(picture.parent / "edit.png"), open_image(picture.parent / "without.png"))


def test_options_change_the_edit(run, weights, picture, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    mmdit = build(PRESETS["tiny"], "mmdit")
    lora.inject(mmdit, 4, 4.0)
    for layer in lora.lora_layers(mmdit).values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    lora.save(mmdit, checkpoint / "lora.safetensors")
    variants = [[], ["--seed", 1], ["--steps", 3], ["--guidance", 9], ["--no-ism"], ["--checkpoint", checkpoint]]
    edits = []
    for variant in variants:
        run("--image", picture, "--prompt", PROMPT, "--steps", 2, *variant)
        edits.append(open_image(tmp_path / "edit.png"))
    edits.append(resize(open_image(picture), 50, 70))
    for i, a in enumerate(edits):
        assert not any(np.array_equal(a, b) for b in edits[i + 1 :]), i


def test_compare_and_depth(run, picture):
    folder = run("--image", picture, "--prompt", PROMPT, "--compare", "--depth", "--output", "new/y.png")
    reference, edit, depth = (open_image(p) for p in (picture, folder / "new/y.png", folder / "new/y_depth.png"))
    assert depth.shape == reference.shape and np.array_equal(depth[..., 0], depth[..., 2]) and depth.std() > 0
    sheet = open_image(folder / "new/y_compare.png")
    assert np.array_equal(sheet[:, :70], reference) and np.array_equal(sheet[:, 78:148], edit)
    assert np.array_equal(sheet[:, -70:], depth)


def test_words_cut_off_are_named_once(weights, picture, tmp_path):
    prompt = PROMPT + " next to the green cone" * 6
    options = ["--preset", "tiny", "--weights", weights, "--image", picture, "--prompt", prompt, "--steps", "1"]
    done = subprocess.run([sys.executable, ROOT / "sample.py", *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith("The prompt is longer than 26 tokens") and done.stderr.count("\n") == 1
    assert done.stderr.endswith('next to the green cone".\n')


def test_unknown_words_are_named_with_the_known_ones(refused):
    sentence = refused("--prompt", "move the zebra next to the red Moon")
    assert "does not know the words: zebra, Moon." in sentence
    for known in ("cube", "snowman", "purple", "between", "near left corner"):
        assert known in sentence


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--prompt", ""], "needs an instruction"),
        (["--prompt", " ?! "], "needs an instruction"),
        (["--image", "missing.png", "--prompt", PROMPT], "picture at missing.png, found no file"),
        (["--image", ".", "--prompt", PROMPT], "found no file"),
        (["--checkpoint", "missing"], "in missing, found none of them"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--dtype", "float16"], "float16 overflows"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--device", "warp"], "Device warp cannot be used here"),
        (["--output", "x.jpg"], "must end in .png"),
        (["--depth", "--no-ism"], "--no-ism leaves them out"),
    ],
)
def test_careless_use(refused, options, sentence):
    assert sentence in refused(*options)


def test_picture_without_prompt_and_unreadable_picture(refused, picture):
    assert "needs an instruction" in refused("--image", picture)
    picture.write_bytes(picture.read_bytes()[:100])
    assert "cannot be read" in refused("--image", picture, "--prompt", PROMPT)
    assert "would overwrite" in refused("--image", picture, "--prompt", PROMPT, "--output", picture)


def test_wrong_checkpoint(refused, tmp_path):
    save_tensors(tmp_path / "wrong" / "connector.safetensors", build(PRESETS["nano"], "connector").state_dict())
    assert "query of shape (64, 192) where (9, 40) was expected" in refused("--checkpoint", tmp_path / "wrong")
    (tmp_path / "wrong" / "connector.safetensors").write_bytes(b"half a file")
    assert "is not a safetensors file" in refused("--checkpoint", tmp_path / "wrong")


def test_checkpoint_of_another_preset_or_model(run, weights, tmp_path, capsys):
    connector = build(PRESETS["tiny"], "connector").state_dict()
    save_tensors(tmp_path / "nano" / "connector.safetensors", connector, {"preset": "nano"})
    save_tensors(tmp_path / "kohya.safetensors", {"lora_unet_img_in.lora_down.weight": torch.zeros(2, 99),
                                                  "lora_unet_img_in.lora_up.weight": torch.zeros(48, 2)})
    save_tensors(tmp_path / "lokr.safetensors", {"lycoris_x.lokr_w1": torch.zeros(2, 9)})
    save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(2)})
    for name, sentence in (("nano", "found that of preset nano"), ("kohya.safetensors", "made for another model"),
                           ("lokr.safetensors", "is a LoKr file"), ("other.safetensors", "found something else")):
        with pytest.raises(SystemExit):
            run("--checkpoint", tmp_path / name)
        out, err = capsys.readouterr()
        assert sentence in err and out == ""  # refused before anything is loaded


def test_weights_of_another_preset(refused, weights, tmp_path):
    for path in weights.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_tensors(tmp_path / "t5.safetensors", build(PRESETS["nano"], "t5").state_dict())
    assert f"preset tiny in {tmp_path}, but found no t5." in refused(weights=tmp_path)
    save_tensors(tmp_path / "mmdit.safetensors", build(PRESETS["nano"], "mmdit").state_dict())
    assert choose_preset(None, tmp_path).name == "nano"
    (tmp_path / "mmdit.safetensors").write_bytes((weights / "mmdit.safetensors").read_bytes()[:-100])
    assert choose_preset(None, tmp_path).name == "nano"  # by T5, so that the sentence is of the transformer
    (tmp_path / "t5.safetensors").unlink()
    assert choose_preset(None, tmp_path).name == "kontext"
    sentence = refused(weights=tmp_path)
    assert "found no t5, mmdit." in sentence and "mmdit.safetensors (" in sentence and "is cut short" in sentence
