"""RMSNorm of q and k with a learned scale, then rotary embedding, written into the joint buffer of both streams.

FLUX's QKNorm and apply_rope in one pass over memory: text and image rows land one after the other in one buffer, so
nothing is concatenated. Per stream one launch handles q and k, and copies v where it is given.

Forward, for a head x (D,) of a token, scale w (D,), rotation (cos_j, sin_j) of the token's pair j:
    r = 1 / sqrt(mean(x^2) + eps)           n = x r                 y = n w
    out_2j   = y_2j cos_j - y_2j+1 sin_j    out_2j+1 = y_2j sin_j + y_2j+1 cos_j
Backward, for the gradient o of out: turn back, then undo the scale, then the norm:
    g_2j = o_2j cos_j + o_2j+1 sin_j        g_2j+1 = o_2j+1 cos_j - o_2j sin_j
    dw = sum over tokens and heads of g n   dx = r (g w - n mean(g w n))
All in fp32, rounded once to the input's dtype. dw is summed per program, then over programs: no atomics, so the same
bits every time.
"""

import math

import torch
from torch import Tensor

from kernels.backend import tl, triton


def qk_norm_rope_reference(streams: list[Tensor], scales: list[Tensor], pe: Tensor) -> Tensor:
    """One or two streams (B, N_i, P, H, D) of q, k and, if P = 3, v -> (B, N, P, H, D), N the sum of N_i.

    scales: q's and k's of each stream in turn, each (D,); pe (N, D / 2, 2) fp32 (cos, sin).
    """
    # without autograd each stream is written to its place in the joint buffer, as the kernel does: the same values
    in_place = streams[0].dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    out = _joint(streams) if in_place else None
    parts, start = [], 0
    for i, x in enumerate(streams):
        rows = slice(start, start + x.shape[1])
        scale = torch.stack(scales[2 * i : 2 * i + 2]).float()[:, None]  # (2, 1, D)
        parts.append(_norm_rope(x[:, :, :2].float(), scale, pe[rows], out[:, rows, :2] if in_place else None))
        if in_place:
            out[:, rows, 2:] = x[:, :, 2:]
        start = rows.stop
    if in_place:
        return out
    qk = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).type_as(streams[0])
    return qk if streams[0].shape[2] == 2 else torch.cat((qk, torch.cat([x[:, :, 2:] for x in streams], dim=1)), dim=2)


def _norm_rope(x: Tensor, scale: Tensor, pe: Tensor, out: Tensor | None) -> Tensor:
    """x (B, N, 2, H, D) fp32. vector_norm and complex numbers: twice as fast on a CPU as F.rms_norm and pairs."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(x.new_full((), 1e-6), norm, norm, value=1 / x.shape[-1])
    y = (x * torch.rsqrt(mean_square)).mul_(scale).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which knows no complex numbers
        (a, b), (cos, sin) = y.unbind(-1), pe[:, None, None].unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    out = None if out is None else torch.view_as_complex(out.unflatten(-1, (-1, 2)))
    return torch.view_as_real(torch.mul(torch.view_as_complex(y), torch.view_as_complex(pe)[:, None, None], out=out)).flatten(-2)


if triton is not None:

    @triton.jit
    def split_pairs(x, ROWS: tl.constexpr, D: tl.constexpr):
        """(ROWS, D) -> channels 2j and 2j + 1, each (ROWS, D / 2) fp32. Both stay in the thread that read them."""
        return tl.split(tl.reshape(x.to(tl.float32), (ROWS, D // 2, 2)))

    @triton.jit
    def join_pairs(a, b, ROWS: tl.constexpr, D: tl.constexpr):
        return tl.reshape(tl.join(a, b), (ROWS, D))

    @triton.jit
    def norm_rope_forward(
        x_ptr, out_ptr, q_scale_ptr, k_scale_ptr, pe_ptr,
        N, H,
        stride_xb, stride_xn, stride_ob, stride_on,
        D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        # x, out (B, N, P, H, D): strides (stride_b, stride_n, H * D, D, 1); pe (N, D / 2, 2) contiguous.
        # program: HEADS heads of one part (0 = q, 1 = k, 2 = v) of TOKENS tokens
        head = tl.program_id(0) * HEADS
        part = head // H
        tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
        channels = tl.arange(0, D)[None, :]
        mask, other = (None, None) if EVEN else (tokens < N, 0.0)
        batch = tl.program_id(2).to(tl.int64)
        x_ptrs = x_ptr + batch * stride_xb + tokens * stride_xn + channels
        out_ptrs = out_ptr + batch * stride_ob + tokens * stride_on + channels

        if part == 2:
            for h in range(head, head + HEADS):
                tl.store(out_ptrs + h * D, tl.load(x_ptrs + h * D, mask), mask)
        else:
            cos, sin = split_pairs(tl.load(pe_ptr + tokens * D + channels, mask, other), TOKENS, D)
            if part == 0:
                wa, wb = split_pairs(tl.load(q_scale_ptr + channels), 1, D)
            else:
                wa, wb = split_pairs(tl.load(k_scale_ptr + channels), 1, D)
            for h in range(head, head + HEADS):
                a, b = split_pairs(tl.load(x_ptrs + h * D, mask, other), TOKENS, D)
                r = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + 1e-6)[:, None]
                a, b = a * r * wa, b * r * wb
                y = join_pairs(a * cos - b * sin, a * sin + b * cos, TOKENS, D)
                tl.store(out_ptrs + h * D, y.to(out_ptr.dtype.element_ty), mask)

    @triton.jit
    def norm_rope_backward(
        dout_ptr, x_ptr, dx_ptr, dscale_ptr, q_scale_ptr, k_scale_ptr, pe_ptr,
        N, H,
        stride_ob, stride_on, stride_xb, stride_xn, stride_dxb, stride_dxn,
        D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        # as forward; dscale (programs, D) fp32 contiguous, a row for each program in order of (batch, tokens, heads)
        head = tl.program_id(0) * HEADS
        part = head // H
        tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
        channels = tl.arange(0, D)[None, :]
        mask, other = (None, None) if EVEN else (tokens < N, 0.0)
        batch = tl.program_id(2).to(tl.int64)
        x_ptrs = x_ptr + batch * stride_xb + tokens * stride_xn + channels
        dx_ptrs = dx_ptr + batch * stride_dxb + tokens * stride_dxn + channels
        dout_ptrs = dout_ptr + batch * stride_ob + tokens * stride_on + channels

        if part == 2:
            for h in range(head, head + HEADS):
                tl.store(dx_ptrs + h * D, tl.load(dout_ptrs + h * D, mask), mask)
        else:
            cos, sin = split_pairs(tl.load(pe_ptr + tokens * D + channels, mask, other), TOKENS, D)
            if part == 0:
                wa, wb = split_pairs(tl.load(q_scale_ptr + channels), 1, D)
            else:
                wa, wb = split_pairs(tl.load(k_scale_ptr + channels), 1, D)
            dwa = tl.zeros((TOKENS, D // 2), tl.float32)
            dwb = tl.zeros((TOKENS, D // 2), tl.float32)
            for h in range(head, head + HEADS):
                a, b = split_pairs(tl.load(x_ptrs + h * D, mask, other), TOKENS, D)
                oa, ob = split_pairs(tl.load(dout_ptrs + h * D, mask, other), TOKENS, D)
                r = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + 1e-6)[:, None]
                a, b = a * r, b * r
                ga, gb = oa * cos + ob * sin, ob * cos - oa * sin
                dwa += ga * a
                dwb += gb * b
                ga, gb = ga * wa, gb * wb
                mean = tl.sum(ga * a + gb * b, axis=1)[:, None] / D
                dx = join_pairs(r * (ga - a * mean), r * (gb - b * mean), TOKENS, D)
                tl.store(dx_ptrs + h * D, dx.to(dx_ptr.dtype.element_ty), mask)
            program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
            dscale = join_pairs(tl.sum(dwa, axis=0)[None, :], tl.sum(dwb, axis=0)[None, :], 1, D)
            tl.store(dscale_ptr + program * D + channels, dscale)


# The kernels only stream memory, so one configuration serves every GPU: 4096 values in 8 warps are 16 bytes per access.
TILE, WARPS = 4096, 8


def _grid(x: Tensor) -> tuple[tuple[int, int, int], dict]:
    """Launch grid (heads of all parts, tokens, batch) and configuration for a stream x (B, N, P, H, D)."""
    B, N, P, H, D = x.shape
    tokens, heads = TILE // D, math.gcd(H, 4)
    meta = dict(D=D, TOKENS=tokens, HEADS=heads, EVEN=N % tokens == 0, num_warps=WARPS)
    return (P * H // heads, triton.cdiv(N, tokens), B), meta


def _check(streams: list[Tensor], scales: list[Tensor], pe: Tensor) -> None:
    B, _, P, H, D = streams[0].shape
    N = sum(x.shape[1] for x in streams)
    assert P in (2, 3), f"Streams hold q, k or q, k, v in their third dimension; this one holds {P} parts."
    assert D in (32, 64, 128, 256), f"Head width {D} is not 32, 64, 128 or 256; use qk_norm_rope_reference."
    assert len(scales) == 2 * len(streams), f"{len(streams)} streams need q's and k's scale each, got {len(scales)}."
    assert pe.shape == (N, D // 2, 2) and pe.dtype == torch.float32 and pe.is_contiguous(), (
        f"pe must be contiguous fp32 ({N}, {D // 2}, 2), got {pe.dtype} {tuple(pe.shape)}."
    )
    for x in streams:
        assert x.shape[2:] == (P, H, D) and x.shape[0] == B, "Streams must agree in all but their length."
        assert x.stride()[2:] == (H * D, D, 1), "The last three dimensions of a stream must be packed."
        assert x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0, (
            "Rows must begin at multiples of 16 bytes and 8 elements (128-bit accesses); make the stream contiguous."
        )


@torch.library.custom_op("spatialdiff::qk_norm_rope", mutates_args=())
def qk_norm_rope_triton(streams: list[Tensor], scales: list[Tensor], pe: Tensor) -> Tensor:
    """As qk_norm_rope_reference. Batch and row strides of the streams are free: views of wider tensors are read as is."""
    _check(streams, scales, pe)
    out = _joint(streams)
    start = 0
    for i, x in enumerate(streams):
        rows = out[:, start : start + x.shape[1]]
        grid, meta = _grid(x)
        norm_rope_forward[grid](
            x, rows, *scales[2 * i : 2 * i + 2], pe[start:],
            x.shape[1], x.shape[3], x.stride(0), x.stride(1), rows.stride(0), rows.stride(1), **meta,
        )  # fmt: skip
        start += x.shape[1]
    return out


@torch.library.custom_op("spatialdiff::qk_norm_rope_backward", mutates_args=())
def _backward(dout: Tensor, streams: list[Tensor], scales: list[Tensor], pe: Tensor) -> list[Tensor]:
    """Gradients of the streams (contiguous), then of the scales."""
    dstreams, dscales, start = [], [], 0
    for i, x in enumerate(streams):
        B, N, P, H, D = x.shape
        rows = dout[:, start : start + N]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        grid, meta = _grid(x)
        dscale = torch.empty(grid[2] * grid[1], P, grid[0] // P, D, dtype=torch.float32, device=x.device)
        norm_rope_backward[grid](
            rows, x, dx, dscale, *scales[2 * i : 2 * i + 2], pe[start:], N, H,
            rows.stride(0), rows.stride(1), x.stride(0), x.stride(1), dx.stride(0), dx.stride(1), **meta,
        )  # fmt: skip
        dstreams.append(dx)
        dscales += [dscale[:, part].sum((0, 1)).type_as(scales[2 * i + part]) for part in range(2)]  # v's is unwritten
        start += N
    return dstreams + dscales


def _joint(streams: list[Tensor]) -> Tensor:
    B, _, P, H, D = streams[0].shape
    return streams[0].new_empty(B, sum(x.shape[1] for x in streams), P, H, D)


@qk_norm_rope_triton.register_fake
def _(streams, scales, pe):
    return _joint(streams)


@_backward.register_fake
def _(dout, streams, scales, pe):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*streams, *scales)]


def _setup_context(ctx, inputs, output):
    streams, scales, pe = inputs
    ctx.save_for_backward(*streams, *scales, pe)
    ctx.num_streams = len(streams)


def _autograd(ctx, dout):
    *saved, pe = ctx.saved_tensors
    n = ctx.num_streams
    grads = _backward(dout.contiguous(), saved[:n], saved[n:], pe)
    return grads[:n], grads[n:], None


qk_norm_rope_triton.register_autograd(_autograd, setup_context=_setup_context)
