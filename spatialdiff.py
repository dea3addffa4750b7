"""SpatialDiff on one page: presets, what is computed once per edit, the model, its losses and its sampler.

    reference image -> VAE -> reference tokens            instruction -> T5 tokens, CLIP vector
    reference image -> VGGT aggregator = S -> Connector -> spatial tokens
    [text, noisy target, reference, spatial] -> MMDiT -> velocity, and (training) spatial tokens -> depth latent

Every network is in model/; every choice the paper leaves open is a field of `Preset`.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import lora
from model.connector import Connector, ConnectorConfig
from model.depth import DEPTH_CONFIGS, DepthAnything
from model.mmdit import MMDiT, MMDiTConfig, position_ids, rope_table
from model.spatial_head import SpatialHead, SpatialHeadConfig
from model.text import CLIPConfig, CLIPText, T5Config, T5Encoder, load_clip_tokenizer, load_tokenizer, tokenize
from model.vae import AutoEncoder, VAEConfig, pack, unpack
from model.vggt import VGGT, VGGTConfig
from model.vit import ViTConfig
from model.weights import Source, fill, identify, scan


@dataclass(frozen=True)
class Preset:
    """All sizes and all choices. Defaults: `kontext`, the paper's setting on FLUX.1 Kontext and VGGT-1B."""

    name: str = "kontext"
    mmdit: MMDiTConfig = MMDiTConfig()
    vae: VAEConfig = VAEConfig()
    t5: T5Config = T5Config()
    clip: CLIPConfig = CLIPConfig()
    vggt: VGGTConfig = VGGTConfig()
    connector: ConnectorConfig = ConnectorConfig()
    spatial_head: SpatialHeadConfig = SpatialHeadConfig()
    t5_length: int = 512
    clip_length: int = 77
    word_tokenizer: bool = False  # one word-level tokenizer.json for both text encoders, instead of the official two
    cpu_dtype: str = "bfloat16"  # on a CPU the official files' own dtype stays mapped; 12 B float32 weights are 48 GB

    side: int = 512  # pixels: the picture's side, or the root of its area where the aspect is kept
    keep_aspect: bool = True

    geometry_layers: tuple[int, ...] = (-1,)  # rounds of the aggregator that make S, joined on channels
    geometry_tokens: str = "patches"  # "patches", "camera" (camera token and patches) or "all" (registers too)

    # t = shift(sigmoid(t_mean + t_std * normal), mu); a share `t_tail` of samples is uniform in [0.95, 1] instead
    t_mean: float = 0.0
    t_std: float = 1.0
    t_tail: float = 0.0
    mu: float | None = None  # of the schedule shift; None: from the number of target tokens, as FLUX does
    steps: int = 30  # of the sampler
    guidance_train: float = 1.0
    guidance_sample: float = 2.5
    gss_weight: float = 0.01  # lambda, paper
    lora_rank: int = 64  # paper
    lora_alpha: float = 64.0

    def __post_init__(self):
        if self.connector.out_dim != self.mmdit.hidden_size or self.spatial_head.dim != self.mmdit.hidden_size:
            raise ValueError(f"Preset {self.name}: Connector and spatial head must have the width of the MMDiT.")


PRESETS = {
    "kontext": Preset(),
    "nano": Preset(
        name="nano",
        mmdit=MMDiTConfig(64, 128, 128, 192, 4.0, 6, 2, 6, (8, 12, 12)),
        vae=VAEConfig(ch=16, ch_mult=(1, 2, 4, 4), num_res_blocks=1, groups=8, scale_factor=1.0, shift_factor=0.0),
        t5=T5Config(vocabulary=160, width=128, depth=3, heads=4, head_dim=32, mlp_hidden=256, max_distance=24),
        clip=CLIPConfig(vocabulary=160, length=24, width=128, depth=2, heads=4, mlp_hidden=512, eos_token_id=1),
        vggt=VGGTConfig(ViTConfig(128, 16, 96, 2, 3, registers=2), depth=2, heads=3, registers=2, layer_scale=1.0),
        connector=ConnectorConfig(in_dim=192, out_dim=192, width=192, heads=6, depth=2, queries=64, mlp_ratio=1.0),
        spatial_head=SpatialHeadConfig(dim=192),
        t5_length=24,
        clip_length=24,
        word_tokenizer=True,
        cpu_dtype="float32",
        side=128,
        keep_aspect=False,
        t_std=1.2,
        t_tail=0.5,
        mu=1.8,
        steps=2,  # a rendered move has one truth: the flow is nearly straight, and more steps add up more error
        guidance_sample=1.0,
    ),
    "tiny": Preset(  # for tests: seconds, odd sizes on purpose
        name="tiny",
        mmdit=MMDiTConfig(16, 20, 28, 48, 3.0, 2, 1, 2, (4, 8, 12)),
        vae=VAEConfig(ch=8, ch_mult=(1, 2, 2, 3), num_res_blocks=1, z_channels=4, groups=4, scale_factor=0.8),
        t5=T5Config(vocabulary=160, width=28, depth=2, heads=3, head_dim=8, mlp_hidden=40, max_distance=24),
        clip=CLIPConfig(vocabulary=160, length=26, width=20, depth=2, heads=2, mlp_hidden=36, eos_token_id=1),
        vggt=VGGTConfig(ViTConfig(42, 14, 24, 1, 2, registers=2), depth=2, heads=2, registers=3),
        connector=ConnectorConfig(in_dim=48, out_dim=48, width=40, heads=2, depth=2, queries=9),
        spatial_head=SpatialHeadConfig(dim=48, out_dim=16),
        t5_length=26,
        clip_length=26,
        word_tokenizer=True,
        cpu_dtype="float32",
        side=48,
        keep_aspect=False,
        steps=8,
        lora_rank=4,
        lora_alpha=4.0,
    ),
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PARTS = {
    "vae": AutoEncoder,
    "t5": T5Encoder,
    "clip": CLIPText,
    "vggt": VGGT,
    "mmdit": MMDiT,
    "connector": Connector,
    "spatial_head": SpatialHead,
}

PUBLISHED = {  # the official files of `kontext`; weights.md says more
    "mmdit": "FLUX.1-Kontext-dev's flux1-kontext-dev.safetensors",
    "vae": "FLUX.1-Kontext-dev's ae.safetensors",
    "t5": "FLUX.1-Kontext-dev's text_encoder_2/",
    "clip": "FLUX.1-Kontext-dev's text_encoder/",
    "vggt": "VGGT-1B's model.safetensors",
}


# ---- what depends only on the edit, computed once -------------------------------------------------------------------


@dataclass
class Condition:
    """One batch of edits, encoded. Everything here is frozen while the Connector, LoRA and head learn."""

    txt: Tensor  # (B, L, Dt) T5 tokens
    pooled: Tensor  # (B, Dp) CLIP vector
    reference: Tensor  # (B, N, C) packed reference latents
    geometry: Tensor | None  # (B, l', d') S of the reference; None: no spatial tokens (plain Kontext)
    grid: tuple[int, int]  # token rows and columns of target and reference, N = rows * columns


def to_unit(images: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) uint8 -> (B, 3, H, W) fp32 in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def encode_image(vae: AutoEncoder, images: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) uint8 -> packed latents (B, H/16 * W/16, 4 z)."""
    dtype = vae.encoder.conv_in.weight.dtype
    return pack(vae.encode((to_unit(images) * 2 - 1).to(dtype)))


@torch.inference_mode()
def decode_image(vae: AutoEncoder, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Packed latents (B, h * w, 4 z) of a token grid (h, w) -> pictures (B, 16 h, 16 w, 3) uint8."""
    latent = unpack(tokens, 2 * grid[0], 2 * grid[1])
    return to_uint8(vae.decode(latent.to(vae.decoder.conv_in.weight.dtype)))


def depth_target(vae: AutoEncoder, disparity: Tensor, grid: int, gss: str) -> Tensor:
    """What the spatial head must say, from disparity pictures (B, H, W) in [-1, 1], near = +1.

    The picture is stretched to the square of the grid x grid spatial tokens (16 pixels each). "lds": the VAE's latent
    of it, packed (B, grid^2, 4 z); "eds": its pixels, one 16 x 16 patch a token (B, grid^2, 256).
    """
    x = F.interpolate(disparity[:, None].float(), (16 * grid, 16 * grid), mode="bilinear", align_corners=True)
    if gss == "eds":
        return F.unfold(x, 16, stride=16).mT
    return pack(vae.encode(x.expand(-1, 3, -1, -1).to(vae.encoder.conv_in.weight.dtype))).float()


@torch.inference_mode()
def decode_depth(vae: AutoEncoder, decoded: Tensor, grid: int) -> Tensor:
    """What the spatial head said, (B, grid^2, 4 z) or (B, grid^2, 256), as grey pictures (B, 16 grid, 16 grid, 3) uint8:
    near is bright. The inverse of `depth_target`."""
    if decoded.shape[-1] == 256:
        return to_uint8(F.fold(decoded.mT.float(), (16 * grid, 16 * grid), 16, stride=16).expand(-1, 3, -1, -1))
    grey = decode_image(vae, decoded, (grid, grid)).float().mean(dim=-1, keepdim=True)
    return grey.round().to(torch.uint8).expand(-1, -1, -1, 3)


def encode_geometry(vggt: VGGT, images: Tensor, preset: Preset) -> Tensor:
    """Pictures (B, H, W, 3) uint8 -> geometry tokens S (B, l', d').

    The longest side becomes the aggregator's picture size, the other the nearest multiple of its patch: no crop, no
    padding, so tokens tile the picture.
    """
    vit = preset.vggt.vit
    x = to_unit(images)
    scale = vit.image_size / max(x.shape[-2:])
    size = [max(1, round(s * scale / vit.patch_size)) * vit.patch_size for s in x.shape[-2:]]
    if size != list(x.shape[-2:]):
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    layers, start = vggt(x, preset.geometry_layers)
    s = torch.cat(layers, dim=-1)[:, 0]  # one frame
    if preset.geometry_tokens == "all":
        return s
    return s[:, start:] if preset.geometry_tokens == "patches" else torch.cat((s[:, :1], s[:, start:]), dim=1)


def encode_text(t5: T5Encoder, clip: CLIPText, tokenizers: tuple, prompts: list[str], preset: Preset) -> tuple[Tensor, Tensor]:
    """Instructions -> T5 tokens (B, L, Dt) and pooled CLIP vector (B, Dp). `tokenizers`: of T5 and of CLIP."""
    device = t5.shared.weight.device
    t5_ids = tokenize(tokenizers[0], prompts, preset.t5_length).to(device)
    clip_ids = tokenize(tokenizers[1], prompts, preset.clip_length).to(device)
    return t5(t5_ids), clip(clip_ids)


# ---- the model ------------------------------------------------------------------------------------------------------


class SpatialDiff(nn.Module):
    """MMDiT, Connector and spatial head: all that learns. The encoders stay outside, frozen and freed in time."""

    def __init__(self, preset: Preset):
        super().__init__()
        self.preset = preset
        self.mmdit = MMDiT(preset.mmdit)
        self.connector = Connector(preset.connector)
        self.spatial_head = SpatialHead(preset.spatial_head)

    def rope(self, cond: Condition) -> Tensor:
        """Rotations of [text, target, reference, spatial]: the image index is 0, 0, 1, 2; text sits at the origin.

        The spatial tokens' grid is stretched over the target's, so their rows and columns may be fractions.
        """
        h, w = cond.grid
        rows, cols = torch.arange(h), torch.arange(w)
        ids = [torch.zeros(cond.txt.shape[1], 3), position_ids(0, rows, cols), position_ids(1, rows, cols)]
        if cond.geometry is not None:
            g = self.connector.grid
            ids.append(position_ids(2, torch.linspace(0, h - 1, g), torch.linspace(0, w - 1, g)))
        config = self.preset.mmdit
        return rope_table(torch.cat(ids), config.axes_dim, config.theta).to(cond.reference.device)

    def spatial_tokens(self, cond: Condition) -> Tensor | None:
        return None if cond.geometry is None else self.connector(cond.geometry)

    def forward(self, x_t: Tensor, t: Tensor, guidance: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """Noisy target tokens x_t (B, N, C) at times t (B,) -> velocity (B, N, C), spatial tokens (B, K, D)."""
        mods = self.mmdit.modulations(t, guidance, cond.pooled)
        return self.mmdit(cond.txt, x_t, cond.reference, self.spatial_tokens(cond), self.rope(cond), mods)


# ---- training -------------------------------------------------------------------------------------------------------


def shift_time(u: Tensor, mu: float) -> Tensor:
    """FLUX's schedule shift of times in [0, 1]: adds mu to the logit; 0 and 1 stay."""
    return math.exp(mu) * u / (1 + (math.exp(mu) - 1) * u)


def shift_mu(preset: Preset, tokens: int) -> float:
    """mu of the schedule: fixed by the preset, or linear in the number of target tokens (256: 0.5, 4096: 1.15)."""
    return preset.mu if preset.mu is not None else 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def sample_times(preset: Preset, count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Training times (count,): logit-normal, shifted as the sampler's schedule is."""
    t = torch.sigmoid(preset.t_mean + preset.t_std * torch.randn(count, generator=generator))
    t = shift_time(t, shift_mu(preset, tokens))
    tail = torch.rand(count, generator=generator) < preset.t_tail
    return torch.where(tail, 0.95 + 0.05 * torch.rand(count, generator=generator), t)


def losses(model: SpatialDiff, cond: Condition, target: Tensor, noise: Tensor, t: Tensor, depth: Tensor | None):
    """Flow-matching loss of every sample (B,), and the GSS loss (scalar, 0 without `depth`).

    target, noise (B, N, C); t (B,); depth (B, K, head width): the packed depth latent E(d_tgt) (LDS) or its pixel
    patches (EDS) at the spatial tokens' places. The paper's loss is their sum, GSS weighted with lambda.
    """
    x_t = (1 - t)[:, None, None] * target + t[:, None, None] * noise
    guidance = torch.full_like(t, model.preset.guidance_train)
    velocity, spatial = model(x_t, t, guidance, cond)
    flow = (velocity.float() - (noise - target)).square().mean(dim=(1, 2))
    if depth is None:
        return flow, flow.new_zeros(())
    return flow, F.mse_loss(model.spatial_head(spatial).float(), depth)


# ---- sampling -------------------------------------------------------------------------------------------------------


def schedule(preset: Preset, steps: int, tokens: int) -> Tensor:
    """Times (steps + 1,) from 1 to 0, shifted by the number of target tokens (the reference does not count)."""
    return shift_time(torch.linspace(1, 0, steps + 1), shift_mu(preset, tokens))


def make_noise(preset: Preset, grid: tuple[int, int], seeds: list[int]) -> Tensor:
    """Packed standard normal noise (B, N, C), drawn on the CPU, one generator per picture: batches change nothing."""
    shape = (1, preset.vae.z_channels, 2 * grid[0], 2 * grid[1])
    return pack(torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]))


@torch.inference_mode()
def sample(model: SpatialDiff, cond: Condition, noise: Tensor, steps: int, guidance: float, drop: bool = False):
    """Euler steps from noise (B, N, C) to packed latents; also the spatial tokens of the last step (B, K, D).

    Spatial tokens, rotations and all modulations depend on the edit alone: they are made once, before the loop. `drop`
    frees the modulation layers then (3.28 of Kontext's 11.9 billion parameters); the model cannot sample again after.
    """
    times = schedule(model.preset, steps, noise.shape[1]).to(noise.device)
    spatial, pe = model.spatial_tokens(cond), model.rope(cond)
    ones = torch.ones(len(noise), device=noise.device)
    table = [model.mmdit.modulations(t * ones, guidance * ones, cond.pooled) for t in times[:-1]]
    if drop:
        model.mmdit.drop_modulation_layers()
    x = noise.float()
    for mods, t, t_next in zip(table, times, times[1:]):
        velocity, out = model.mmdit(cond.txt, x, cond.reference, spatial, pe, mods)
        x = x + (t_next - t) * velocity.float()
    return x, out


# ---- loading --------------------------------------------------------------------------------------------------------


class Uninitialised(TorchFunctionMode):
    """Modules born inside draw no random weights, which on the meta device would cost seconds: torch takes its compiler
    along to do nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def build(preset: Preset, part: str, device="cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """One network of `PARTS`, with fresh weights (none on the meta device)."""
    with torch.device(device), Uninitialised() if torch.device(device).type == "meta" else nullcontext():
        module = PARTS[part](getattr(preset, part))
    return module.to(dtype) if dtype else module


def sizes(network: str) -> dict[str, nn.Module]:
    """The sizes a network comes in, on the meta device: one a preset, or Depth Anything's three."""
    with torch.device("meta"), Uninitialised():
        if network == "depth":
            return {f"Depth Anything V2 {name}": DepthAnything(config) for name, config in DEPTH_CONFIGS.items()}
        return {f"preset {preset.name}": PARTS[network](getattr(preset, network)) for preset in PRESETS.values()}


def choose_device(preset: Preset, name: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and the reason for them. ValueError, in a sentence, for what is not there or not supported."""
    if name is None:
        name, reason = ("cuda", "CUDA found") if torch.cuda.is_available() else ("cpu", "no CUDA device found")
    else:
        reason = "as asked"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"Device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu.") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current one
    if dtype in ("float16", "fp16", "half"):
        raise ValueError("float16 overflows in T5 and in the transformer; choose --dtype bfloat16 or float32.")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype}.")
    return device, DTYPES[dtype or (preset.cpu_dtype if device.type == "cpu" else "bfloat16")], reason


def choose_preset(name: str | None, weights: Path | None) -> Preset:
    """The preset asked for; else the one that the transformer in `weights` belongs to, or T5 where that is not to be read;
    else, without weights, nano."""
    if name or weights is None:
        return PRESETS[name or "nano"]
    sources = scan(weights)[0]
    fits = (p for part in ("mmdit", "t5") for p in PRESETS.values() for source in sources
            if source.network == part and not source.mismatch(build(p, part, "meta").state_dict()))
    return next(fits, PRESETS["kontext"])


def default_folders(preset: Preset, weights: Path | None, checkpoint: Path | None) -> tuple[Path, Path]:
    """Folders of the frozen networks and of what SpatialDiff trained, if not given: weights/ for the official files,
    weights/<preset> for others; and stage2 in it."""
    here = Path(__file__).parent / "weights"
    weights = weights or (here if preset.name == "kontext" else here / preset.name)
    return weights, checkpoint or weights / "stage2"


def find_frozen(preset: Preset, folder: Path, parts: tuple[str, ...]) -> dict[str, Source]:
    """Where these networks of the preset are among all files below `folder`. FileNotFoundError names every one that is
    not there, where it is published, and what is wrong with files that come near."""
    sources, problems = scan(folder)
    found, missing = {}, []
    for part in parts:
        expected = build(preset, part, "meta").state_dict()
        clauses = {source: source.mismatch(expected) for source in sources if source.network == part}
        fitting = [source for source, clause in clauses.items() if not clause]
        if fitting:
            found[part] = fitting[0]
        else:
            missing.append(f"{part} ({PUBLISHED[part]})" if preset.name == "kontext" else part)
            others = [module.state_dict() for module in sizes(part).values()]  # a whole network of another preset is no news
            problems += [f"{source} does not hold the {part} of this preset: {clause}." for source, clause in clauses.items()
                         if all(source.mismatch(other) for other in others)]
    if missing:
        raise FileNotFoundError(" ".join([f"Expected the networks of preset {preset.name} in {folder}, but found no {', '.join(missing)}. "
                                          "See weights.md, or give --preset and --weights that go together.", *problems]))
    return found


def find_learned(preset: Preset, checkpoint: Path, asked: bool) -> dict[str, Source]:
    """What SpatialDiff trained: connector, spatial_head and lora `.safetensors` in the folder `checkpoint`, those that are
    there; or one LoRA file. FileNotFoundError if there is nothing though it was asked for."""
    names = ("connector", "spatial_head", "lora")
    paths = {"lora": checkpoint} if checkpoint.is_file() else {part: checkpoint / f"{part}.safetensors" for part in names}
    found = {}
    for part, path in paths.items():
        if path.is_file():
            sources = [source for source in identify([path]) if source.network == part]
            if not sources or sources[0].metadata.get("preset", preset.name) != preset.name:
                raise ValueError(f"Expected the {part} of preset {preset.name} in {path}, found "
                                 + (f"that of preset {sources[0].metadata['preset']}." if sources else "something else.")
                                 + " Give the --output folder of a training with this preset.")
            found |= {part: sources[0]}
    if "lora" in found:  # tried without weights, so that a file of another kind is refused before anything is loaded
        lora.load(build(preset, "mmdit", "meta"), found["lora"].files[0])
    if asked and not found:
        raise FileNotFoundError(f"Expected connector.safetensors, spatial_head.safetensors or lora.safetensors in "
                                f"{checkpoint}, found none of them. Give the --output folder of a training.")
    return found


def load_part(preset: Preset, source: Source, device="cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """One network in evaluation mode, frozen. Errors as `model.weights.fill`."""
    if source.network == "spatial_head" and source.weights["fc2.bias"][2] == (256,):  # trained with --gss eds
        preset = replace(preset, spatial_head=replace(preset.spatial_head, out_dim=256))
    return fill(build(preset, source.network, "meta", dtype), source, device).eval().requires_grad_(False)


def find_depth(folder: Path) -> tuple[DepthAnything, Source]:
    """The teacher of GSS, Depth Anything V2 of whichever size lies below `folder`: on the meta device, and its weights.
    FileNotFoundError if there is none."""
    found, problems = scan(folder)
    for source in found:
        for module in sizes("depth").values() if source.network == "depth" else ():
            if not source.mismatch(module.state_dict()):
                return module, source
    raise FileNotFoundError(" ".join([f"Expected model.safetensors of depth-anything/Depth-Anything-V2-Large-hf, Base or Small below "
                                      f"{folder}, found none that is complete. See weights.md.", *problems]))


def load_depth(folder: Path, device="cpu") -> DepthAnything:
    """What `find_depth` finds, in fp32."""
    return fill(*find_depth(folder), device).eval().requires_grad_(False)


def load_tokenizers(preset: Preset, folder: Path) -> tuple:
    """The tokenizers of T5 (a tokenizer.json) and CLIP (vocab.json and merges.txt), wherever they lie below `folder`."""
    files = sorted(Path(folder).rglob("tokenizer.json"), key=lambda path: len(path.parts))
    if preset.word_tokenizer:
        return (load_tokenizer(files[0] if files else Path(folder) / "tokenizer.json"),) * 2
    t5 = [path for path in files if b'"Unigram"' in path.read_bytes()]
    clip = [path.parent for path in sorted(Path(folder).rglob("merges.txt")) if (path.parent / "vocab.json").is_file()]
    if not t5 or not clip:
        raise FileNotFoundError(f"Expected T5's tokenizer.json and CLIP's vocab.json with merges.txt below {folder}, but "
                                f"{'the first' if clip else 'the second' if t5 else 'neither'} is not there. They are the folders "
                                "tokenizer_2/ and tokenizer/ of black-forest-labs/FLUX.1-Kontext-dev, see weights.md.")
    return load_tokenizer(t5[0]), load_clip_tokenizer(clip[0])


def load_model(preset: Preset, sources: dict[str, Source], device="cpu", dtype=None) -> SpatialDiff:
    """MMDiT, and what is there of Connector, spatial head and LoRA (merged).

    Without a Connector the model has no spatial tokens to offer: `connector` and `spatial_head` are None.
    """
    with torch.device("meta"), Uninitialised():
        model = SpatialDiff(preset)
    for part in ("mmdit", "connector", "spatial_head"):
        setattr(model, part, load_part(preset, sources[part], device, dtype) if part in sources else None)
    if "lora" in sources:
        lora.load(model.mmdit, sources["lora"].files[0])
        lora.merge(model.mmdit)
    return model.eval().requires_grad_(False)


@dataclass
class Editor:
    """Every network in memory at once: evaluation and sample sheets. sample.py stages them one after the other."""

    preset: Preset
    vae: AutoEncoder
    t5: T5Encoder
    clip: CLIPText
    vggt: VGGT | None  # None: no spatial tokens
    tokenizers: tuple
    model: SpatialDiff
    sources: dict[str, Source]

    @torch.inference_mode()
    def condition(self, images: Tensor, prompts: list[str]) -> Condition:
        """Reference pictures (B, H, W, 3) uint8 and one instruction each."""
        images = images.to(self.t5.shared.weight.device)
        txt, pooled = encode_text(self.t5, self.clip, self.tokenizers, prompts, self.preset)
        geometry = None if self.vggt is None else encode_geometry(self.vggt, images, self.preset)
        grid = (images.shape[1] // 16, images.shape[2] // 16)
        return Condition(txt, pooled, encode_image(self.vae, images), geometry, grid)

    def edit(self, images, prompts: list[str], seeds: list[int], steps: int | None = None, guidance: float | None = None,
             alter_geometry=None):
        """Edited pictures, uint8 (B, H, W, 3) as given. Each sample's noise comes from its own seed."""
        return self.edit_and_depth(images, prompts, seeds, steps, guidance, alter_geometry, depth=False)[0]

    @torch.inference_mode()
    def edit_and_depth(self, images, prompts: list[str], seeds: list[int], steps: int | None = None,
                       guidance: float | None = None, alter_geometry=None, depth: bool = True):
        """Edited pictures as `edit`, and what the spatial head says of their depth, grey pictures (B, 16 g, 16 g, 3) uint8,
        near is bright; None without `depth`, spatial tokens or a head. alter_geometry: a function of the geometry tokens S
        (B, l', d') before they are used, to see whether they are."""
        cond = self.condition(torch.as_tensor(images), prompts)
        if alter_geometry is not None:
            cond.geometry = alter_geometry(cond.geometry)
        guidance = self.preset.guidance_sample if guidance is None else guidance
        noise = make_noise(self.preset, cond.grid, seeds).to(cond.reference.device)
        tokens, spatial = sample(self.model, cond, noise, steps or self.preset.steps, guidance)
        pictures, head = decode_image(self.vae, tokens, cond.grid).cpu().numpy(), self.model.spatial_head
        if not depth or cond.geometry is None or head is None:
            return pictures, None
        return pictures, decode_depth(self.vae, head(spatial), self.model.connector.grid).cpu().numpy()

    def vae_roundtrip(self, images):
        """The pictures after the autoencoder alone: the best any edit could look."""
        images = torch.as_tensor(images).to(self.t5.shared.weight.device)
        grid = (images.shape[1] // 16, images.shape[2] // 16)
        with torch.inference_mode():
            return decode_image(self.vae, encode_image(self.vae, images), grid).cpu().numpy()


def load(preset: Preset, weights: Path, checkpoint: Path | None, device="cpu", dtype=None, ism: bool = True) -> Editor:
    """An Editor from the networks in `weights` and `checkpoint`; without a Connector, or with ism=False, no spatial tokens."""
    sources = find_learned(preset, checkpoint, asked=False) if checkpoint else {}
    ism = ism and "connector" in sources
    sources |= find_frozen(preset, weights, ("mmdit", "vae", "t5", "clip") + ("vggt",) * ism)
    tokenizers = load_tokenizers(preset, weights)
    model = load_model(preset, sources, device, dtype)
    vae, t5, clip = (load_part(preset, sources[part], device, dtype) for part in ("vae", "t5", "clip"))
    vggt = load_part(preset, sources["vggt"], device, dtype) if ism else None
    return Editor(preset, vae, t5, clip, vggt, tokenizers, model, sources)
