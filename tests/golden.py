"""Golden file for ports: random weights of the `tiny` preset and every activation they must give.

    python -m tests.golden --out golden/     writes golden/tiny.safetensors
    python -m tests.golden --mistakes        prints what typical mistakes look like on it (the table of PORTING.md)

In the file: `weights.<part>.*`, `input.*`, the outputs of every block under the name of its module (`mmdit.double_blocks.0`,
`.img` and `.txt` where a block has two), `step.*` (one Euler step), `sample.*` (the whole sampler), `train.*` (one training
step with LoRA) and `grad.*`. fp32, one CPU thread, the same bytes every time. tests/PORTING.md says how to use it.
"""

import argparse
import contextlib
import functools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

import spatialdiff
from model import lora, mmdit, text, vae, vggt, vit
from spatialdiff import PARTS, PRESETS, Condition, SpatialDiff

TINY = PRESETS["tiny"]
H, W = 48, 64  # pixels; not square, so that exchanged axes show
STEP = 2  # the recorded step of the sampler

INPUTS = {
    "input.images": "(B, H, W, 3) uint8, the reference pictures",
    "input.target_images": "(B, H, W, 3) uint8, the edited pictures of the training step",
    "input.disparity": "(B, H, W) in [-1, 1], near = +1: of the targets, for the depth latent of GSS",
    "input.t5_ids": "(B, L) with the end token 1 and padding 0, which takes part: there is no mask",
    "input.clip_ids": "(B, L) with the end token 1, more of them after the first",
    "input.noise": "(B, N, C) packed: x of the Euler step, start of the sampler, noise of the training step",
    "input.guidance": "(), of the Euler step and the sampler; the training step has the preset's guidance_train",
    "input.t": "(B,) times of the training step",
}

# outputs that are kept, by module name
WATCHED = {
    "t5": r"shared|encoder\.block\.\d+|encoder\.final_layer_norm",
    "clip": r"text_model\.encoder\.layers\.\d+|text_model\.final_layer_norm",
    "vae": r"(encoder|decoder)\.(conv_in|mid|norm_out|conv_out|(down|up)\.\d+(\.downsample|\.upsample)?)",
    "vggt": r"patch_embed\.(patch_embed|blocks\.\d+|norm)|(frame|global)_blocks\.\d+",
    "connector": r"norm_in|proj_in|blocks\.\d+|proj_out",
    "mmdit": r"(img|txt|time|vector|guidance)_in|final_layer(\.adaLN_modulation)?|(double|single)_blocks\.\d+"
    r"(\.\w+_mod\.lin|\.\w+_attn\.qkv|\.\w+_attn\.proj|\.\w+_mlp|\.modulation\.lin|\.linear1|\.linear2)?",
    "spatial_head": r"norm|fc1|fc2",
}


@contextlib.contextmanager
def recorded(out: dict[str, Tensor], parts: dict[str, nn.Module], prefix: str = ""):
    """Keeps the outputs of the watched modules in `out`, in the order in which they run."""

    def keep(name: str, module: nn.Module, args: tuple, output) -> None:
        for suffix, x in zip((".img", ".txt"), output) if isinstance(output, tuple) else (("", output),):
            out[prefix + name + suffix] = x.detach().clone()

    hooks = [
        module.register_forward_hook(functools.partial(keep, f"{part}.{name}"))
        for part, root in parts.items()
        for name, module in root.named_modules()
        if re.fullmatch(WATCHED[part], name)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def patched(*changes: tuple[object, str, object]):
    """Sets attributes (object, name, value) and puts the old ones back."""
    with contextlib.ExitStack() as stack:
        for thing, name, value in changes:
            own = name in vars(thing)
            stack.callback(setattr, thing, name, getattr(thing, name)) if own else stack.callback(delattr, thing, name)
            setattr(thing, name, value)
        yield


# ---- what is given and what comes out -------------------------------------------------------------------------------


def given(preset=TINY) -> dict[str, Tensor]:
    """Weights and inputs. Matrices are N(0, 1/inputs), scales N(1, 0.3), biases N(0, 0.1): none may be forgotten."""
    g = torch.Generator().manual_seed(0)
    tensors = {}

    def draw(name: str, shape: torch.Size) -> None:
        scale = len(shape) == 1 and name.endswith(("weight", "scale", "gamma"))
        std = 0.3 if scale else 0.1 if len(shape) == 1 else (shape.numel() / shape[0]) ** -0.5
        tensors[f"weights.{name}"] = torch.randn(shape, generator=g) * std + scale

    parts = {part: spatialdiff.build(preset, part, "meta") for part in PARTS}
    for part, module in parts.items():
        for name, p in module.named_parameters():
            draw(f"{part}.{name}", p.shape)
    lora.inject(parts["mmdit"], preset.lora_rank, preset.lora_alpha)
    for name, layer in lora.lora_layers(parts["mmdit"]).items():
        draw(f"lora.{name}.lora_A", layer.lora_A.shape)
        draw(f"lora.{name}.lora_B", layer.lora_B.shape)

    def ids(vocabulary: int, length: int, ends: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
        x = torch.randint(2, vocabulary, (len(ends), length), generator=g)
        for row, end in zip(x, ends):
            row[end], row[end + 1 :] = 1, torch.tensor(after).repeat(length)[: length - end - 1]
        return x

    for name in ("images", "target_images"):
        tensors[f"input.{name}"] = torch.randint(0, 256, (2, H, W, 3), generator=g, dtype=torch.uint8)
    tensors["input.disparity"] = torch.rand(2, H, W, generator=g) * 2 - 1
    tensors["input.t5_ids"] = ids(preset.t5.vocabulary, preset.t5_length, (9, 20), (0,))
    tensors["input.clip_ids"] = ids(preset.clip.vocabulary, preset.clip_length, (7, 23), (0, 1))
    tensors["input.noise"] = spatialdiff.make_noise(preset, (H // 16, W // 16), [3, 4])
    tensors["input.guidance"] = torch.tensor(2.5)
    tensors["input.t"] = torch.tensor([0.3, 0.87])
    return tensors


def compute(given: dict[str, Tensor], preset=TINY, dtype: torch.dtype = torch.float32, wrong=None) -> dict[str, Tensor]:
    """Every activation and gradient, in the order of computation. wrong: parts -> changes for `patched`."""
    parts = {part: spatialdiff.build(preset, part, "meta", dtype) for part in PARTS}
    parts["spatial_head"].float()  # as the loss has it
    for part, module in parts.items():
        prefix = f"weights.{part}."
        own = torch.float32 if part == "spatial_head" else dtype
        weights = {name.removeprefix(prefix): x.to(own) for name, x in given.items() if name.startswith(prefix)}
        module.load_state_dict(weights, strict=True, assign=True)
        module.eval().requires_grad_(False)
    wide = torch.promote_types(dtype, torch.float32)  # of x and the times, which are never rounded to bf16
    images, noise, times = given["input.images"], given["input.noise"].to(wide), given["input.t"].to(wide)
    out, grid = {}, (H // 16, W // 16)
    with torch.device("meta"):
        model = SpatialDiff(preset)
    model.mmdit, model.connector, model.spatial_head = (parts[p] for p in ("mmdit", "connector", "spatial_head"))

    def keep(name: str, x: Tensor) -> Tensor:
        out[name] = x.detach().clone()
        return x

    with patched(*(wrong(parts) if wrong else ())):
        rope_table = spatialdiff.rope_table

        def kept_rope_table(ids: Tensor, *args) -> Tensor:
            return keep("step.rope_table", rope_table(keep("step.position_ids", ids), *args))

        with torch.no_grad(), recorded(out, parts), patched((spatialdiff, "rope_table", kept_rope_table)):
            txt = keep("step.txt", parts["t5"](given["input.t5_ids"]))
            pooled = keep("step.pooled", parts["clip"](given["input.clip_ids"]))
            reference = keep("step.reference", spatialdiff.encode_image(parts["vae"], images))
            parts["vggt"].register_forward_pre_hook(lambda _, args: out.update({"step.vggt_pixels": args[0].clone()}))
            geometry = keep("step.geometry", spatialdiff.encode_geometry(parts["vggt"], images, preset))
            cond = Condition(txt, pooled, reference, geometry, grid)

            schedule = keep("step.schedule", spatialdiff.schedule(preset, preset.steps, noise.shape[1]))
            t, t_next, ones = schedule[STEP], schedule[STEP + 1], torch.ones(len(noise))
            spatial, pe = model.spatial_tokens(cond), model.rope(cond)
            keep("step.timestep_embedding", mmdit.timestep_embedding(t * ones))
            mods = model.mmdit.modulations(t * ones, given["input.guidance"] * ones, pooled)
            velocity, tokens = model.mmdit(txt, noise, reference, spatial, pe, mods)
            keep("step.velocity", velocity)
            keep("step.spatial_tokens", tokens)
            keep("step.x_next", noise + (t_next - t) * velocity.to(wide))
            parts["spatial_head"](tokens.float())

        with torch.no_grad():
            x, _ = spatialdiff.sample(model, cond, noise, preset.steps, given["input.guidance"].item())
            keep("sample.tokens", x)
            with recorded(out, parts):
                keep("sample.image", parts["vae"].decode(vae.unpack(x, 2 * grid[0], 2 * grid[1]).to(dtype)))
        if dtype == torch.bfloat16:  # what learns is fp32
            return out

        with torch.no_grad():
            target = keep("train.target", spatialdiff.encode_image(parts["vae"], given["input.target_images"]))
            square = model.connector.grid
            depth = keep("train.depth", spatialdiff.depth_target(parts["vae"], given["input.disparity"], square, "lds"))
        lora.inject(model.mmdit, preset.lora_rank, preset.lora_alpha)
        for name, layer in lora.lora_layers(model.mmdit).items():
            for factor in ("lora_A", "lora_B"):
                setattr(layer, factor, nn.Parameter(given[f"weights.lora.{name}.{factor}"].to(dtype)))
        model.connector.requires_grad_(True)
        model.spatial_head.requires_grad_(True)
        with recorded(out, {"mmdit": model.mmdit, "spatial_head": model.spatial_head}, "train."):
            flow, gss = spatialdiff.losses(model, cond, target, noise, times, depth)
        loss = keep("train.flow_loss", flow).mean() + preset.gss_weight * keep("train.gss_loss", gss)
        keep("train.loss", loss).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                keep(f"grad.{name}", p.grad)
    return out


def write(path: Path) -> None:
    """The golden file. One metadata entry: safetensors writes several in no fixed order."""
    tensors = given()
    out = compute(tensors)
    header = {
        "about": "SpatialDiff, preset tiny, random weights; fp32. Compare in the order of `order`: the first difference "
        "is where the mistake is.",
        "preset": asdict(TINY),
        "inputs": INPUTS,
        "grid": "3 x 4 target tokens of 48 x 64 pixels; sequence [text, target, reference, spatial]",
        "step": f"from step.schedule[{STEP}] to step.schedule[{STEP + 1}], x = input.noise, without LoRA",
        "sample": "all steps from input.noise, without LoRA; then the VAE's decoder",
        "train": "losses with GSS and the LoRA weights.lora.*; train.loss = mean(flow_loss) + gss_weight * gss_loss; "
        "grad.* of train.loss",
        "order": list(out),
    }
    tensors = {name: x.contiguous() for name, x in {**tensors, **out}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(tensors, {"golden": json.dumps(header)}))
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size / 1e6:.1f} MB")


# ---- what typical mistakes look like --------------------------------------------------------------------------------


def functional(**changes) -> SimpleNamespace:
    """torch.nn.functional with other functions, to stand in for a module's `F`."""
    return SimpleNamespace(**{**vars(F), **changes})


def exact_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, **_) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def rope_halves(streams: list[Tensor], scales: list[Tensor], pe: Tensor, f=mmdit.qk_norm_rope) -> Tensor:
    order = torch.arange(2 * pe.shape[1]).view(2, -1).mT.flatten()  # channel j beside channel j + D / 2
    return f([x[..., order] for x in streams], [scale[order] for scale in scales], pe)[..., order.argsort()]


def rope_2d_pairs(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    (a, b), (cos, sin) = x.float().unflatten(-1, (2, -1, 2)).unbind(-1), rope
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-3).type_as(x)


def t5_mask(parts: dict) -> list:
    forward, attend, padding = text.T5Encoder.forward, text.T5Attention.forward, []

    def encoder(self, ids):
        padding[:] = [(ids == 0)[:, None, None]]
        return forward(self, ids)

    def attention(self, x, bias):
        return attend(self, x, bias.masked_fill(padding[0], -torch.inf))

    return [(text.T5Encoder, "forward", encoder), (text.T5Attention, "forward", attention)]


def ids_with(change):
    """position_ids with (index, rows, cols) changed."""
    return [(spatialdiff, "position_ids", lambda index, rows, cols: change(mmdit.position_ids, index, rows, cols))]


def of_time(change):
    """timestep_embedding of another t, for time and guidance alike."""
    embed = mmdit.timestep_embedding
    return [(mmdit, "timestep_embedding", lambda t: embed(change(t)))]


def qkv_as(change):
    """joint_qkv of other channels (3, H, D)."""
    joint, heads = mmdit.joint_qkv, TINY.mmdit.num_heads

    def wrong(qkvs, norms, pe):
        return joint([change(qkv.unflatten(-1, (3, heads, -1)), heads).flatten(-3) for qkv in qkvs], norms, pe)

    return [(mmdit, "joint_qkv", wrong)]


def modulate_as(wrong):
    """modulate, alone and after a residual, by another formula."""
    return [
        (mmdit, "modulate", wrong),
        (mmdit, "residual_modulate", lambda x, gate, y, *mods: (x + gate * y, wrong(x + gate * y, *mods))),
    ]


def pack_channels_last(latent: Tensor) -> Tensor:
    return vae.pack(latent).unflatten(-1, (-1, 4)).mT.flatten(-2)


def clip_last_position(self, ids: Tensor) -> Tensor:
    """CLIPText.forward, its rule left out."""
    model = self.text_model
    x = model.embeddings.token_embedding(ids) + model.embeddings.position_embedding.weight[: ids.shape[1]]
    for layer in model.encoder.layers:
        x = layer(x)
    return model.final_layer_norm(x[:, -1])


def sampled_latent(self, image: Tensor) -> Tensor:
    mean, logvar = self.encode_moments(image)
    sample = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).type_as(mean)
    return (sample - self.config.shift_factor) * self.config.scale_factor


def norms(module: nn.Module, kind: type) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, kind)]


def exact_timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    angle = 1000 * t.double()[:, None] * 10_000 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def rope_table_fp32(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    omegas = [theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim) for dim in axes_dim]
    angle = torch.cat([x[:, None] * omega for x, omega in zip(ids.mT, omegas)], dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


MISTAKES = {  # parts -> changes for `patched`
    "none, time embedding in fp64": lambda p: [(mmdit, "timestep_embedding", exact_timestep_embedding)],
    "none, RoPE angles in fp32": lambda p: [(spatialdiff, "rope_table", rope_table_fp32)],
    "T5: attention mask on padding": t5_mask,
    "T5: scores scaled by 1/sqrt(d)": lambda p: [(text, "F", functional(scaled_dot_product_attention=plain_attention))],
    "T5: distance query - key instead of key - query": lambda p: [
        (text, "relative_buckets", lambda *a, f=text.relative_buckets: f(*a).T)
    ],
    "T5: exact GELU instead of tanh": lambda p: [(text, "F", functional(gelu=exact_gelu))],
    "CLIP: end token by largest id, though its id is not the largest": lambda p: [
        (p["clip"], "config", replace(p["clip"].config, eos_token_id=2))
    ],
    "CLIP: state of the last position": lambda p: [(text.CLIPText, "forward", clip_last_position)],
    "CLIP: GELU instead of quick_gelu": lambda p: [(text.CLIPMLP, "forward", lambda s, x: s.fc2(F.gelu(s.fc1(x))))],
    "VAE: a sample instead of the mean": lambda p: [(vae.AutoEncoder, "encode", sampled_latent)],
    "VAE: mean * scale - shift": lambda p: [
        (vae.AutoEncoder, "encode", lambda s, x: s.encode_moments(x)[0] * s.config.scale_factor - s.config.shift_factor)
    ],
    "VAE: downsampling padded on all sides": lambda p: [
        (vae.Downsample, "forward", lambda s, x: F.conv2d(x, s.conv.weight, s.conv.bias, stride=2, padding=1))
    ],
    "VAE: GroupNorm eps 1e-5": lambda p: [(m, "eps", 1e-5) for m in norms(p["vae"], nn.GroupNorm)],
    "packing with channels last": lambda p: [(spatialdiff, "pack", pack_channels_last)],
    "VGGT: pixels not normalised": lambda p: [(vggt, "normalize", lambda x: x)],
    "VGGT: position table resampled without antialiasing": lambda p: [
        (p["vggt"].patch_embed, "config", replace(p["vggt"].patch_embed.config, antialias=False))
    ],
    "VGGT: RoPE of neighbouring pairs": lambda p: [(vit, "apply_rope_2d", rope_2d_pairs)],
    "VGGT: patches start at position 0": lambda p: [
        (vggt, "rope_2d", lambda x, *a, f=vggt.rope_2d: f((x - 1).clamp(min=0), *a))
    ],
    "VGGT: tanh GELU instead of exact": lambda p: [(vit, "F", functional(gelu=lambda x: F.gelu(x, approximate="tanh")))],
    "Connector: norm of S left out": lambda p: [(p["connector"].norm_in, "forward", lambda x: x)],
    "ids: rows and columns exchanged": lambda p: ids_with(lambda f, i, r, c: f(i, r, c)[:, [0, 2, 1]]),
    "ids: reference has index 0": lambda p: ids_with(lambda f, i, r, c: f(0 if i == 1 else i, r, c)),
    "ids: spatial grid not stretched": lambda p: ids_with(
        lambda f, i, r, c: f(i, *((torch.arange(len(x)) for x in (r, c)) if i == 2 else (r, c)))
    ),
    "RoPE: halves instead of neighbouring pairs": lambda p: [(mmdit, "qk_norm_rope", rope_halves)],
    "sequence: rotations of the text last instead of first": lambda p: [
        (spatialdiff, "rope_table", lambda ids, *a, f=mmdit.rope_table: f(ids, *a).roll(-TINY.t5_length, dims=0))
    ],
    "time: t and guidance rounded to bf16, as the official codes do": lambda p: of_time(
        lambda t: (t.bfloat16() * 1000).float() / 1000
    ),
    "time: t not multiplied by 1000": lambda p: of_time(lambda t: t / 1000),
    "time: sines before cosines": lambda p: [
        (mmdit, "timestep_embedding", lambda t, f=mmdit.timestep_embedding: f(t).roll(128, dims=1))
    ],
    "modulation: scale, shift, gate": lambda p: [
        *modulate_as(lambda x, shift, scale, f=mmdit.modulate: f(x, scale, shift)),
        (mmdit.LastLayer, "modulations", lambda s, v, f=mmdit.LastLayer.modulations: f(s, v)[::-1]),
    ],
    "modulation: no SiLU on vec": lambda p: [
        (mmdit.Modulation, "forward", lambda s, vec: s.lin(vec)[:, None].chunk(s.chunks, dim=-1))
    ],
    "final layer: scale before shift (diffusers' norm_out)": lambda p: [
        (mmdit.LastLayer, "modulations", lambda s, v, f=mmdit.LastLayer.modulations: f(s, v)[::-1])
    ],
    "MMDiT: LayerNorm eps 1e-5": lambda p: modulate_as(
        lambda x, shift, scale: (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-5) + shift
    ),
    "MMDiT: channels in the order k, q, v": lambda p: qkv_as(lambda x, heads: x[..., [1, 0, 2], :, :]),
    "MMDiT: channels in the order q, v, k": lambda p: qkv_as(lambda x, heads: x[..., [0, 2, 1], :, :]),
    "MMDiT: (heads, 3, D) instead of (3, heads, D)": lambda p: qkv_as(
        lambda x, heads: x.flatten(-3).unflatten(-1, (heads, 3, -1)).transpose(-2, -3)
    ),
    "MMDiT, Connector: scales of q and k norm left out": lambda p: [
        (mmdit.RMSNorm, "forward", lambda s, x: F.rms_norm(x.float(), s.scale.shape, eps=1e-6)),
        (mmdit, "qk_norm_rope", lambda x, scales, pe, f=mmdit.qk_norm_rope: f(x, [torch.ones_like(w) for w in scales], pe)),
    ],
    "MMDiT: exact GELU instead of tanh": lambda p: [
        (mmdit, "gelu", exact_gelu),
        (mmdit, "beside_gelu", lambda attn, mlp: torch.cat((attn, F.gelu(mlp)), dim=-1)),
    ],
    "schedule: mu from target and reference tokens": lambda p: [
        (spatialdiff, "shift_mu", lambda preset, tokens, f=spatialdiff.shift_mu: f(preset, 2 * tokens))
    ],
    "GSS: far = +1": lambda p: [
        (spatialdiff, "depth_target", lambda v, d, *a, f=spatialdiff.depth_target: f(v, -d, *a))
    ],
    "loss: noise and target exchanged": lambda p: [
        (spatialdiff, "losses", lambda m, c, x, n, *a, f=spatialdiff.losses: f(m, c, n, x, *a))
    ],
}


def first_error(out: dict[str, Tensor], right: dict[str, Tensor], noise: float) -> tuple[str | None, dict[str, float]]:
    """The first tensor, in order of computation, that is wrong by more than `noise`; and the error of each."""
    errors = {name: error(x, right[name]) for name, x in out.items()}
    return next((name for name, e in errors.items() if e > noise), None), errors


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference from the right values b, relative to the largest of them."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def rounding() -> dict[str, list[str]]:
    """Rows of PORTING.md's table of rounding errors: the largest of a group of tensors in fp32 and bf16, against fp64."""
    tensors, rows = given(), {}
    right = compute(tensors, dtype=torch.float64)
    errors = [first_error(compute(tensors, dtype=dtype), right, 0)[1] for dtype in (torch.float32, torch.bfloat16)]
    for group in ("t5", "clip", "vae.encoder", "vggt", "connector", "mmdit", "spatial_head", "step.velocity", "sample.tokens",
                  "vae.decoder", "train", "grad"):
        worst = [max((e for name, e in es.items() if name.startswith(group)), default=None) for es in errors]
        rows[f"`{group}`"] = ["-" if e is None else f"{e:.1e}" for e in worst]
    return rows


def table() -> dict[str, list[str]]:
    """Rows of PORTING.md's table of mistakes. In fp64, so that what is left is the mistake."""
    tensors, rows = given(), {}
    right = compute(tensors, dtype=torch.float64)
    runs = {
        "none, in fp32": {},
        "none, weights and activations in bf16": {"dtype": torch.bfloat16},
        **{name: {"dtype": torch.float64, "wrong": wrong} for name, wrong in MISTAKES.items()},
    }
    for name, run in runs.items():
        first, errors = first_error(compute(tensors, **run), right, 1e-6)
        gradients = [e for key, e in errors.items() if key.startswith("grad.")]
        cells = [errors.get(first, 0), errors["step.velocity"], errors["sample.image"], max(gradients, default=None)]
        rows[name] = [f"`{first}`" if first else "-", *("-" if e is None else f"{e:.1e}" if e > 1e-9 else "0" for e in cells)]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("golden"), help="folder for tiny.safetensors")
    parser.add_argument("--mistakes", action="store_true", help="print the table of typical mistakes instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if args.mistakes:
        print("| tensors | fp32 | bf16 |\n|---|---|---|")
        for name, cells in rounding().items():
            print(f"| {name} | {' | '.join(cells)} |")
        print("\n| mistake | first shows at | there | velocity | picture | worst gradient |\n|---|---|---|---|---|---|")
        for name, cells in table().items():
            print(f"| {name} | {' | '.join(cells)} |")
    else:
        write(args.out / "tiny.safetensors")
