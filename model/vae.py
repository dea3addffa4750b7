"""The autoencoder: pictures to latents and back, and latents to transformer tokens.

The image E(x) that the flow moves, and E(d_tgt) that the geometry-aware spatial supervision regresses.
In: pictures (B, 3, H, W) in [-1, 1], H and W multiples of 8. Out: latents (B, 16, H/8, W/8), then tokens
of 2 x 2 latents. Names and arithmetic agree with black-forest-labs/flux `modules/autoencoder.py`, so that
`ae.safetensors` loads strictly.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are those of FLUX.1-Kontext-dev."""

    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    groups: int = 32  # of every GroupNorm; must divide ch times each multiplier
    scale_factor: float = 0.3611  # fitted to the latents, so that they have about unit variance
    shift_factor: float = 0.1159


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all latent pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))  # (B, 1, hw, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution; holds the `downsample` or `upsample` that follows them, if any."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for a, b in zip([config.ch] + widths, widths):
            self.down.append(Level(a, b, config.num_res_blocks, config.groups))
        for level in self.down[:-1]:
            level.downsample = Downsample(level.block[-1].conv2.out_channels)
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = group_norm(widths[-1], config.groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))  # (B, 2 z, H/8, W/8): mean | logvar


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList()  # up.0 is the full resolution, run last
        for a, b in zip(widths[1:] + widths[-1:], widths):
            self.up.append(Level(a, b, config.num_res_blocks + 1, config.groups))
        for level in self.up[1:]:
            level.upsample = Upsample(level.block[-1].conv2.out_channels)
        self.norm_out = group_norm(widths[0], config.groups)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoEncoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        for m in config.ch_mult:
            if config.ch * m % config.groups:
                raise ValueError(f"GroupNorm with {config.groups} groups needs every width to be a multiple of it, "
                                 f"but ch * {m} = {config.ch * m}; choose another `groups` or `ch` in VAEConfig.")
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent, before shift and scale: what a KL term needs.

        image (B, 3, H, W) in [-1, 1]. Returns two tensors (B, z, H/8, W/8). Raises ValueError when H or W
        is not a multiple of 8 (of 2 to the number of downsamplings).
        """
        factor = 2 ** (len(self.config.ch_mult) - 1)
        if image.shape[-2] % factor or image.shape[-1] % factor:
            raise ValueError(f"The autoencoder takes sides that are multiples of {factor}, but the picture is "
                             f"{image.shape[-1]} x {image.shape[-2]}; resize it first.")
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar

    def encode(self, image: Tensor) -> Tensor:
        """Picture (B, 3, H, W) in [-1, 1] to latent (B, z, H/8, W/8): the mean, never a sample, as in Kontext."""
        mean, _ = self.encode_moments(image)
        return (mean - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (B, z, h, w) to picture (B, 3, 8h, 8w), nominally in [-1, 1] but not clamped."""
        return self.decoder(latent / self.config.scale_factor + self.config.shift_factor)


def pack(latent: Tensor) -> Tensor:
    """Latent (B, C, h, w), h and w even, to tokens (B, h/2 * w/2, 4C) in row-major order.

    Element (c, 2r + p, 2s + q) becomes feature 4c + 2p + q of token r * w/2 + s, as in Flux.
    """
    B, C, h, w = latent.shape
    if h % 2 or w % 2:
        raise ValueError(f"Packing takes 2 x 2 latents per token, but the latent is {h} x {w}; "
                         "use a picture whose sides are multiples of 16.")
    latent = latent.reshape(B, C, h // 2, 2, w // 2, 2)
    return latent.permute(0, 2, 4, 1, 3, 5).reshape(B, (h // 2) * (w // 2), C * 4)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Inverse of `pack`: tokens (B, h/2 * w/2, 4C) to the latent (B, C, h, w)."""
    B, N, D = tokens.shape
    if N != (h // 2) * (w // 2):
        raise ValueError(f"A latent of {h} x {w} has {(h // 2) * (w // 2)} tokens, but {N} were given.")
    tokens = tokens.reshape(B, h // 2, w // 2, D // 4, 2, 2)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(B, D // 4, h, w)
