"""Loading: official files are recognised and fit at full size; layouts give the same numbers; bad files are explained.

    pytest tests/test_weights.py

Full-size files are sparse: a real header made from tests/data/manifests, holes instead of data.
"""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import bench_weights
from model.mmdit import MMDiTConfig
from model.vae import VAEConfig
from model.weights import FLUX_DIFFUSERS, VAE_DIFFUSERS, fill, identify, read_header, scan, translate
from model.weights import main as command_line
from spatialdiff import PRESETS, build, find_frozen, load_depth, sizes

MANIFESTS = Path(__file__).parent / "data" / "manifests"
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
TINY = PRESETS["tiny"]


def write_sparse(path, tensors, metadata=None):
    """A safetensors file of these names, dtypes and shapes whose data is a hole."""
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def read_manifest(name):
    rows = [line.split("\t") for line in (MANIFESTS / f"{name}.tsv").read_text().splitlines() if not line.startswith("#")]
    return {key: (dtype, [int(n) for n in shape.split("x")] if shape != "scalar" else []) for key, shape, dtype in rows}


def randomized(part, preset=TINY, seed=0):
    module, generator = build(preset, part), torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.normal_(generator=generator)
    return module.requires_grad_(False)


# ---- official files, at full size -----------------------------------------------------------------------------------

OFFICIAL = {  # manifest: network, layout, tensors that are weights of ours, parameters
    "flux1-kontext-dev.bfl": ("mmdit", "BFL", 780, 11_901_408_320),
    "flux1-kontext-dev.diffusers_transformer": ("mmdit", "diffusers", 1160, 11_901_408_320),
    "flux1-dev-kontext_fp8_scaled.comfyui": ("mmdit", "BFL", 780, 11_901_408_320),
    "ae.bfl": ("vae", "BFL", 244, 83_819_683),
    "vae.diffusers": ("vae", "diffusers", 244, 83_819_683),
    "t5_xxl_encoder.hf": ("t5", "Hugging Face", 219, 4_762_310_656),
    "t5xxl_fp16.comfyui": ("t5", "Hugging Face", 219, 4_762_310_656),
    "t5xxl_fp8_e4m3fn.comfyui": ("t5", "Hugging Face", 219, 4_762_310_656),
    "t5xxl_fp8_e4m3fn_scaled.comfyui": ("t5", "Hugging Face", 219, 4_762_310_656),
    "clip_l.hf": ("clip", "Hugging Face", 196, 123_060_480),
    "clip_l.comfyui": ("clip", "Hugging Face", 196, 123_060_480),
    "vggt-1b": ("vggt", "VGGT", 1210, 909_112_320),
    "depth-anything-v2-small-hf": ("depth", "Hugging Face", 287, 24_785_089),
    "depth-anything-v2-base-hf": ("depth", "Hugging Face", 287, 97_470_785),
    "depth-anything-v2-large-hf": ("depth", "Hugging Face", 503, 335_315_649),
}
VGGT_HEADS = {"camera_head.token_norm.weight": ("F32", [2048]), "track_head.tracker.norm.bias": ("F32", [128])}


@pytest.mark.parametrize("manifest", OFFICIAL)
def test_official_file_fits(manifest, tmp_path):
    network, layout, count, parameters = OFFICIAL[manifest]
    tensors = read_manifest(manifest)
    write_sparse(tmp_path / "x.safetensors", tensors | (VGGT_HEADS if network == "vggt" else {}), {"anything": "else"})
    (source,) = identify([tmp_path / "x.safetensors"])
    assert (source.network, source.layout, len(source.weights)) == (network, layout, count)
    assert source.scaled == ("scaled" in manifest)
    modules = {name: m for name, m in sizes(network).items() if not source.mismatch(m.state_dict())}
    ((size, module),) = modules.items()
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert size == (f"Depth Anything V2 {manifest.split('-')[3]}" if network == "depth" else "preset kontext")

    for name in list(source.weights)[:: count // 20]:  # no tensor may be missing, of another shape or unknown
        rest = {key: t for key, t in source.tensors.items() if key != name}
        other = type(source)(network, layout, "", source.key_map, rest, {})
        assert "1 tensor missing" in other.mismatch(module.state_dict())
        path, dtype, shape = source.tensors[name]
        other = type(source)(network, layout, "", source.key_map, rest | {name: (path, dtype, (*shape[:-1], shape[-1] + 1))}, {})
        assert " was expected" in other.mismatch(module.state_dict())
    other = type(source)(network, layout, "", source.key_map, rest | {name: (path, "I8", shape)}, {})
    assert "stored as I8, a quantisation" in other.mismatch(module.state_dict())
    other = type(source)(network, layout, "", source.key_map, source.tensors | {"new.weight": (path, dtype, (3,))}, {})
    assert other.mismatch(module.state_dict()) == "1 tensor surplus: new.weight"


def test_a_folder_as_published_and_one_as_collected(tmp_path):
    """The repository's own arrangement with shards beside an arrangement of single files: names and places do not count."""
    transformer, t5 = read_manifest("flux1-kontext-dev.diffusers_transformer"), read_manifest("t5_xxl_encoder.hf")
    for folder, stem, tensors in (("transformer", "diffusion_pytorch_model", transformer), ("text_encoder_2", "model", t5)):
        index = json.loads((MANIFESTS / {"model": "t5_xxl_encoder.hf.index.json"}.get(
            stem, "flux1-kontext-dev.diffusers_transformer.index.json")).read_text())["weight_map"]
        for file in set(index.values()):
            write_sparse(tmp_path / "hub" / folder / file, {n: t for n, t in tensors.items() if index[n] == file})
    write_sparse(tmp_path / "hub/vae/diffusion_pytorch_model.safetensors", read_manifest("vae.diffusers"))
    write_sparse(tmp_path / "hub/text_encoder/model.safetensors", read_manifest("clip_l.hf"))
    parts = ("mmdit", "vae", "t5", "clip")
    found = find_frozen(PRESETS["kontext"], tmp_path / "hub", parts)
    assert [found[p].layout for p in parts] == ["diffusers", "diffusers", "Hugging Face", "Hugging Face"]
    assert [len(found[p].files) for p in parts] == [3, 1, 2, 1]

    with pytest.raises(FileNotFoundError, match="found no vggt .VGGT-1B's model.safetensors.\\."):
        find_frozen(PRESETS["kontext"], tmp_path, (*parts, "vggt"))
    write_sparse(tmp_path / "hub/flux1-kontext-dev.safetensors", read_manifest("flux1-kontext-dev.bfl"))
    write_sparse(tmp_path / "more/a.safetensors", read_manifest("vggt-1b"))
    write_sparse(tmp_path / "more/b.safetensors", read_manifest("flux1-dev-kontext_fp8_scaled.comfyui"))
    found = find_frozen(PRESETS["kontext"], tmp_path, (*parts, "vggt"))
    assert found["mmdit"].files == [tmp_path / "hub/flux1-kontext-dev.safetensors"]  # neither converted nor quantised
    assert found["vggt"].files == [tmp_path / "more/a.safetensors"] and found["vggt"].prefix == "aggregator."

    (tmp_path / "hub/text_encoder_2/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no t5 .*holds 1 of the 2 files model-\*-of-00002"):
        find_frozen(PRESETS["kontext"], tmp_path, parts)


# ---- the same numbers from every layout -----------------------------------------------------------------------------


def filled(part, path, dtype=torch.float32):
    found = {source.network: source for source in scan(path)[0]}
    return fill(build(TINY, part, "meta", dtype), found[part]).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("part", ["mmdit", "vae", "t5", "clip", "vggt"])
@pytest.mark.parametrize("prefix", ["", "all-in-one"])
def test_official_names(part, prefix, tmp_path):
    module = randomized(part)
    prefix = prefix and {"mmdit": "model.diffusion_model.", "vae": "vae.", "clip": "text_encoders.clip_l.transformer.",
                         "t5": "text_encoders.t5xxl.transformer.", "vggt": "aggregator."}[part]
    tensors = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    if part == "t5":
        tensors[f"{prefix}encoder.embed_tokens.weight"] = tensors[f"{prefix}shared.weight"].clone()
    if prefix:  # the networks of an all-in-one file do not disturb each other
        tensors |= {f"conditioner.{i}": torch.zeros(1) for i in range(3)} | {"camera_head.x": torch.zeros(1)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert equal(filled(part, tmp_path), module.state_dict())


@pytest.mark.parametrize("part", ["mmdit", "vae"])
@pytest.mark.parametrize("shards", [1, 3])
def test_diffusers_layout_round_trip(part, shards, tmp_path):
    """Ours -> diffusers by the independent table -> ours by the key map, bit for bit."""
    peers = pytest.importorskip("tests.peers")
    mmdit = MMDiTConfig(16, 24, 48, 64, 4.0, 2, 2, 3, (4, 14, 14))  # sizes that diffusers has too
    preset = replace(TINY, mmdit=mmdit, vae=VAEConfig(ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=1, z_channels=4),
                     connector=replace(TINY.connector, out_dim=64), spatial_head=replace(TINY.spatial_head, dim=64))
    module = randomized(part, preset)
    peer = {"mmdit": peers.transformer_peer, "vae": peers.vae_peer}[part](module)
    tensors = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        save_file(dict(list(tensors.items())[i::shards]), tmp_path / name)
    (source,) = scan(tmp_path)[0]
    assert source.layout == "diffusers"
    assert equal(fill(build(preset, part, "meta"), source).state_dict(), module.state_dict())


def test_key_maps_equal_the_tables():
    for table, key_map in (("keymap_transformer", FLUX_DIFFUSERS), ("keymap_vae", VAE_DIFFUSERS)):
        for line in (MANIFESTS / f"{table}.tsv").read_text().splitlines():
            if not line.startswith("#"):
                ours, theirs, _ = line.split("\t")
                assert translate(ours, key_map) == theirs.split(",")


@pytest.mark.parametrize("part", ["mmdit", "t5"])
@pytest.mark.parametrize("scale, marker", [("scale_weight", "scaled_fp8"), ("weight_scale", None), (None, None)])
def test_fp8(part, scale, marker, tmp_path):
    """Scaled: the real weight is fp8 x scale, rounded once; without marker and scales: a plain cast."""
    generator, tensors, expected = torch.Generator().manual_seed(1), {}, {}
    for name, tensor in randomized(part).state_dict().items():
        tensors[name] = expected[name] = tensor.bfloat16()
        if tensor.ndim == 2 and name.endswith(".weight"):
            fp8, s = tensor.to(torch.float8_e4m3fn), torch.rand((), generator=generator)
            tensors[name], expected[name] = fp8, (fp8.float() * (s if scale else 1)).bfloat16()
            if scale:
                tensors[name.removesuffix("weight") + scale] = s
                tensors[name.removesuffix("weight") + ("scale_input" if marker else "input_scale")] = torch.rand(())
    if marker:
        tensors[marker] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "x.safetensors")
    assert equal(filled(part, tmp_path, torch.bfloat16), expected)
    if scale:
        name = next(n for n in tensors if n.endswith(scale))
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="one scale each, but found none"):
            filled(part, tmp_path, torch.bfloat16)


def test_depth_anything_is_loaded_by_its_size(tmp_path):
    small = sizes("depth")["Depth Anything V2 small"]
    tensors = {name: torch.full(shape, 0.5) for name, (_, shape) in read_manifest("depth-anything-v2-small-hf").items()}
    tensors["backbone.encoder.layer.3.attention.attention.key.weight"].fill_(0.25)
    save_file(tensors, tmp_path / "model.safetensors")
    depth = load_depth(tmp_path)
    assert depth.state_dict().keys() == small.state_dict().keys()
    assert depth.backbone.blocks[3].attn.qkv.weight[:, 0].tolist() == [0.5] * 384 + [0.25] * 384 + [0.5] * 384
    with pytest.raises(FileNotFoundError, match="Depth-Anything-V2-Large-hf, Base or Small"):
        load_depth(MANIFESTS)


# ---- bad files ------------------------------------------------------------------------------------------------------

WHOLE = save({"double_blocks.0.x": torch.arange(50.0), "img_in.bias": torch.zeros(3)})


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "is empty: download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>log in</html>", "web page"),
        (b'{"error":"access denied"}', "error message"),
        (b"PK\x03\x04" + bytes(300), "is a pickle"),
        (b"\x80\x02}q\x00" + bytes(300), "is a pickle"),
        (b"GGUF" + bytes(300), "GGUF"),
        (WHOLE[:-1], "cut short"),
        (WHOLE[:60], "cut short"),
        (WHOLE[:5], "is not a safetensors file"),
        (b"\xff" * 64, "is not a safetensors file"),
        (WHOLE.replace(b"F32", b"F99"), "its header is damaged"),
        (WHOLE.replace(b'"shape":[50]', b'"shape":[51]'), "its header is damaged"),
    ],
)
def test_what_else(content, sentence, tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_header(path)
    assert str(path) in str(error.value)
    monkeypatch.setattr("sys.argv", ["", str(path)])
    assert command_line() == 1 and sentence in capsys.readouterr().out


def test_mutated_headers(tmp_path):
    """1,000 damaged headers: each loads as it was, or is refused in a ValueError; nothing else, no hang."""
    module = build(TINY, "connector")
    path = tmp_path / "x.safetensors"
    save_file(module.state_dict(), path)
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            data[int(torch.randint(length, (), generator=generator))] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(data)
        sources, problems = scan(path)
        try:
            for source in sources:
                fill(build(TINY, "connector", "meta"), source)
        except ValueError as error:
            problems.append(str(error))
        refused += bool(problems)
        assert problems or sources
    assert refused > 900


def test_wrong_content_is_named(tmp_path):
    path, module = tmp_path / "x.safetensors", randomized("vae")
    tensors = module.state_dict()
    tensors["decoder.conv_in.bias"][1] = math.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match="decoder.conv_in.bias holds values that are not finite"):
        filled("vae", path)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="does not hold a AutoEncoder of this preset: 1 tensor missing: decoder.conv_in.bias"):
        filled("vae", path)
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, path)
    assert scan(path)[0][0].network == "lora"
    save_file({"something": torch.zeros(1)}, path)
    assert "of no network known here" in scan(path)[1][0]
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        scan(tmp_path / "absent")


def test_mapped_weights_are_not_copied(tmp_path):
    """On a CPU in the file's dtype: the parameters are the file. In another dtype they are not."""
    module = randomized("mmdit").bfloat16()
    save_file(module.state_dict(), tmp_path / "x.safetensors")
    for dtype, mapped in ((torch.bfloat16, True), (torch.float32, False)):
        fill(loaded := build(TINY, "mmdit", "meta", dtype), scan(tmp_path)[0][0])
        address = loaded.txt_in.weight.data_ptr()
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        inside = [m[-1] for m in maps if int(m[0].split("-")[0], 16) <= address < int(m[0].split("-")[1], 16)]
        assert (inside == [str(tmp_path / "x.safetensors")]) == mapped


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_no_second_copy(fp8, tmp_path):
    """Files of 4 GB into bf16: own memory peaks at most 5 % above the tensors' bytes; at none where they stay mapped."""
    config = bench_weights.FOUR_B if fp8 else bench_weights.TWO_B
    path = tmp_path / "x.safetensors"
    bench_weights.write_random(path, config, fp8)
    assert path.stat().st_size > 4e9
    with bench_weights.Peak() as peak:
        module = bench_weights.ours(path, config, torch.bfloat16)
    path.unlink()
    size = 2 * sum(p.numel() for p in module.parameters()) / 1e9
    assert peak.most <= (1.05 if fp8 else 0.05) * size
