"""The MMDiT backbone of FLUX.1 Kontext with spatial tokens (the method's velocity network v_theta).

Text, noisy target latents, reference latents and spatial tokens attend to each other in one sequence
[text, target, reference, spatial]; out come the velocity of the target tokens and the spatial tokens after the last
block. Names, shapes and mathematics are those of black-forest-labs/flux, so its checkpoint loads unchanged; without
spatial tokens this is FLUX.1 Kontext.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import attention, beside_gelu, gelu, modulate, qk_norm_rope, residual_modulate


@dataclass(frozen=True)
class MMDiTConfig:
    """Defaults: flux1-kontext-dev."""

    in_channels: int = 64  # 16 latent channels x 2 x 2
    vec_in_dim: int = 768  # pooled text width (CLIP)
    context_in_dim: int = 4096  # text token width (T5)
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double-stream blocks
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # channels of a head that rotate with image index, row, column
    theta: int = 10_000
    guidance_embed: bool = True


def position_ids(index: float, rows: Tensor, cols: Tensor) -> Tensor:
    """Ids (len(rows) * len(cols), 3) fp32 of a row-major grid: (index, row, column); fractions are allowed."""
    r, c = torch.meshgrid(rows.float(), cols.float(), indexing="ij")
    return torch.stack((torch.full_like(r, index), r, c), dim=-1).flatten(0, 1)


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Rotations of every position: ids (N, 3) -> (N, D / 2, 2) fp32 holding (cos, sin), D = sum(axes_dim).

    Channel pair j of an axis turns by id * theta^(-2j / d_axis). Angles are taken in fp64 and rounded once.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(ids[:, axis, None].double() * omega)  # (N, dim / 2)
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoids of 1000 * t: t (B,) -> (B, dim) fp32, cosines first. t is the time in [0, 1] or the guidance scale.

    fp32 throughout: rounding t to bf16, as the official codes do, changes the velocity by more than all the rest of
    bf16 arithmetic.
    """
    omega = torch.exp(-math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angle = 1000.0 * t.float()[:, None] * omega
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), eps=1e-6)


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)  # fp32: RoPE follows


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)


def joint_qkv(qkvs: list[Tensor], norms: list[QKNorm], pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, N_i, 3 * H * D) of each stream -> q, k (normed and rotated) and v of the joint sequence, (B, N, H, D)."""
    scales = [norm.scale for qk in norms for norm in (qk.query_norm, qk.key_norm)]
    streams = [qkv.unflatten(-1, (3, -1, len(scales[0]))) for qkv in qkvs]  # (B, N_i, 3, H, D)
    if len(streams) == 1:  # v stays where it is
        return *qk_norm_rope([streams[0][:, :, :2]], scales, pe).unbind(2), streams[0][:, :, 2]
    return qk_norm_rope(streams, scales, pe).unbind(2)


class Modulation(nn.Module):
    """vec (B, C) -> `chunks` tensors (B, 1, C): shift, scale, gate (twice in a double block)."""

    def __init__(self, dim: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.lin = nn.Linear(dim, chunks * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.chunks, dim=-1)


class DoubleStreamBlock(nn.Module):
    """Text and image keep their own weights and meet in one attention."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        for stream in ("img", "txt"):
            mlp = nn.Sequential(nn.Linear(dim, int(dim * mlp_ratio)), GELU(), nn.Linear(int(dim * mlp_ratio), dim))
            self.add_module(f"{stream}_mod", Modulation(dim, 6))
            self.add_module(f"{stream}_attn", SelfAttention(dim, num_heads))
            self.add_module(f"{stream}_mlp", mlp)

    def modulations(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.img_mod(vec) + self.txt_mod(vec)

    def forward(self, img: Tensor, txt: Tensor, pe: Tensor, mods: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = mods[:6]
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = mods[6:]

        img_qkv = self.img_attn.qkv(modulate(img, i_shift1, i_scale1))
        txt_qkv = self.txt_attn.qkv(modulate(txt, t_shift1, t_scale1))
        attn = attention(*joint_qkv([txt_qkv, img_qkv], [self.txt_attn.norm, self.img_attn.norm], pe)).flatten(2)
        txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)

        img, x = residual_modulate(img, i_gate1, self.img_attn.proj(img_attn), i_shift2, i_scale2)
        img = torch.addcmul(img, i_gate2, self.img_mlp(x))
        txt, x = residual_modulate(txt, t_gate1, self.txt_attn.proj(txt_attn), t_shift2, t_scale2)
        txt = torch.addcmul(txt, t_gate2, self.txt_mlp(x))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image share weights; attention and MLP run in parallel (ViT-22B)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.sizes = (3 * dim, int(dim * mlp_ratio))
        self.linear1 = nn.Linear(dim, sum(self.sizes))
        self.linear2 = nn.Linear(dim + self.sizes[1], dim)
        self.norm = QKNorm(dim // num_heads)
        self.modulation = Modulation(dim, 3)

    def modulations(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.modulation(vec)

    def forward(self, x: Tensor, pe: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        shift, scale, gate = mods
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.sizes, dim=-1)
        attn = attention(*joint_qkv([qkv], [self.norm], pe)).flatten(2)
        return torch.addcmul(x, gate, self.linear2(beside_gelu(attn, mlp)))


class LastLayer(nn.Module):
    def __init__(self, dim: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def modulations(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)  # shift, scale

    def forward(self, x: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        return self.linear(modulate(x, *mods))


class MMDiT(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        c = self.config = config
        if sum(c.axes_dim) * c.num_heads != c.hidden_size:
            raise ValueError(f"{c.num_heads} heads of {sum(c.axes_dim)} RoPE channels do not make width {c.hidden_size}.")
        dim = c.hidden_size
        self.img_in = nn.Linear(c.in_channels, dim)
        self.time_in = MLPEmbedder(256, dim)
        self.vector_in = MLPEmbedder(c.vec_in_dim, dim)
        if c.guidance_embed:
            self.guidance_in = MLPEmbedder(256, dim)
        self.txt_in = nn.Linear(c.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(dim, c.num_heads, c.mlp_ratio) for _ in range(c.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(dim, c.num_heads, c.mlp_ratio) for _ in range(c.depth_single_blocks)
        )
        self.final_layer = LastLayer(dim, c.in_channels)
        self.checkpoint_blocks = False  # recompute each block in the backward pass: less memory, more time

    def layers(self) -> list[nn.Module]:
        """Every modulated layer, in the order of `modulations`."""
        return [*self.double_blocks, *self.single_blocks, self.final_layer]

    def compile_layers(self) -> None:
        """torch.compile: one graph of the whole network where it is small, which saves the calls between graphs; else one
        for each kind of layer, since the time to compile grows with the graph."""
        for module in [self] if len(self.layers()) <= 16 else self.layers():
            module.compile()

    def modulations(self, t: Tensor, guidance: Tensor, pooled: Tensor) -> list[tuple[Tensor, ...]]:
        """All adaLN modulations of one step, one tuple of (B, 1, C) tensors per layer.

        t (B,) in [0, 1], guidance (B,), pooled (B, vec_in_dim). They depend on nothing else, so a sampler can make the
        table of its whole schedule first and call `drop_modulation_layers`.
        """
        dtype = self.vector_in.in_layer.weight.dtype
        vec = self.time_in(timestep_embedding(t).to(dtype)) + self.vector_in(pooled.to(dtype))
        if self.config.guidance_embed:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(dtype))
        return [layer.modulations(vec) for layer in self.layers()]

    def drop_modulation_layers(self) -> int:
        """Frees every layer that only `modulations` uses; returns the number of parameters freed."""
        before = sum(p.numel() for p in self.parameters())
        for block in self.double_blocks:
            del block.img_mod, block.txt_mod
        for block in self.single_blocks:
            del block.modulation
        del self.final_layer.adaLN_modulation, self.time_in, self.vector_in
        if self.config.guidance_embed:
            del self.guidance_in
        return before - sum(p.numel() for p in self.parameters())

    def forward(
        self,
        txt: Tensor,
        target: Tensor,
        reference: Tensor,
        spatial: Tensor | None,
        pe: Tensor,
        mods: list[tuple[Tensor, ...]],
    ) -> tuple[Tensor, Tensor]:
        """One velocity.

        txt (B, L, context_in_dim); target, reference (B, N, in_channels) packed latents; spatial (B, K, hidden_size)
        from the Connector or None; pe: `rope_table` of the ids of [text, target, reference, spatial]; mods: from
        `modulations`. Returns the velocity (B, N_target, in_channels) and the spatial tokens after the last block
        (B, K, hidden_size), K = 0 without them.
        """
        dtype = self.img_in.weight.dtype
        img = self.img_in(torch.cat((target.to(dtype), reference.to(dtype)), dim=1))
        if spatial is not None:
            img = torch.cat((img, spatial.type_as(img)), dim=1)
        txt = self.txt_in(txt.to(dtype))
        run = self._checkpointed if self.checkpoint_blocks and torch.is_grad_enabled() else lambda block, *args: block(*args)

        mods = iter(mods)
        for block in self.double_blocks:
            img, txt = run(block, img, txt, pe, next(mods))
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = run(block, x, pe, next(mods))
        n_txt, n_target, n_reference = txt.shape[1], target.shape[1], reference.shape[1]
        velocity = self.final_layer(x[:, n_txt : n_txt + n_target], next(mods))
        return velocity, x[:, n_txt + n_target + n_reference :]

    @staticmethod
    def _checkpointed(block: nn.Module, *args):
        return checkpoint(block, *args, use_reentrant=False)
