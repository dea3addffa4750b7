"""LayerNorm with adaLN shift and scale, alone or after a gated residual: the glue of every block, one pass over memory.

Forward, for a token x (C,) and the sample's shift b, scale s, gate g (C,):
    h = x + g y  rounded to the dtype (h = x without a residual)
    n = (h - mean(h)) r,  r = 1 / sqrt(var(h) + eps)        out = (1 + s) n + b
Backward, for gradients o of out and e of h (e = 0 without a residual):
    db = sum over tokens of o       ds = sum over tokens of o n
    m = (1 + s) o                   dh = e + r (m - mean(m) - n mean(m n))
    dx = dh       dy = g dh         dg = sum over tokens of y dh
All in fp32, rounded once to the dtype. Sums over tokens are taken per program, then over programs: no atomics, so the
same bits every time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the reference runs without it
    triton = None


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LayerNorm(x) + shift for x (B, N, C); shift, scale (B, 1, C)."""
    if x.shape[0] == 1:  # then they are LayerNorm's own weight and bias: one pass instead of three
        return F.layer_norm(x.float(), x.shape[-1:], 1 + scale.float().flatten(), shift.float().flatten(), 1e-6).type_as(x)
    return torch.addcmul(shift.float(), 1 + scale.float(), F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)).type_as(x)


def residual_modulate_reference(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """h = x + gate y and modulate(h): x, y (B, N, C); gate, shift, scale (B, 1, C)."""
    h = torch.addcmul(x, gate, y)
    return h, modulate_reference(h, shift, scale)


if triton is not None:

    @triton.jit
    def modulate_forward(
        x_ptr, gate_ptr, y_ptr, shift_ptr, scale_ptr, h_ptr, out_ptr,
        N, rows,
        stride_xb, stride_xn, stride_yb, stride_yn, stride_gb, stride_bb, stride_sb,
        C: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
    ):  # fmt: skip
        # x, y (B, N, C): strides (stride_b, stride_n, 1); gate, shift, scale (B, 1, C): (stride_gb | bb | sb, -, 1);
        # h, out (B, N, C) contiguous. C is constexpr so that the mask keeps 16-byte accesses whole.
        # program: `rows` tokens of a sample
        batch = tl.program_id(1).to(tl.int64)
        start = tl.program_id(0) * rows
        channels = tl.arange(0, BLOCK)
        mask = channels < C
        shift = tl.load(shift_ptr + batch * stride_bb + channels, mask, 0.0)
        scale = tl.load(scale_ptr + batch * stride_sb + channels, mask, 0.0)
        if RESIDUAL:
            gate = tl.load(gate_ptr + batch * stride_gb + channels, mask, 0.0)
        for row in range(start, tl.minimum(start + rows, N)):
            h = tl.load(x_ptr + batch * stride_xb + row * stride_xn + channels, mask, 0.0).to(tl.float32)
            offsets = (batch * N + row) * C + channels
            if RESIDUAL:
                y = tl.load(y_ptr + batch * stride_yb + row * stride_yn + channels, mask, 0.0)
                rounded = (h + gate.to(tl.float32) * y.to(tl.float32)).to(h_ptr.dtype.element_ty)
                tl.store(h_ptr + offsets, rounded, mask)
                h = rounded.to(tl.float32)
            h = tl.where(mask, h - tl.sum(h) / C, 0.0)
            out = h * tl.rsqrt(tl.sum(h * h) / C + 1e-6)
            out = (1 + scale.to(tl.float32)) * out + shift.to(tl.float32)
            tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask)

    @triton.jit
    def modulate_backward(
        dh_ptr, dout_ptr, h_ptr, gate_ptr, y_ptr, scale_ptr, dx_ptr, dy_ptr, dmod_ptr,
        N, rows,
        stride_hb, stride_hn, stride_yb, stride_yn, stride_gb, stride_sb,
        C: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
    ):  # fmt: skip
        # as forward; dh, dout, dx, dy (B, N, C) contiguous; dmod (3 or 2, B, programs, C) fp32 contiguous: each
        # program's dshift, dscale, dgate
        batch = tl.program_id(1).to(tl.int64)
        start = tl.program_id(0) * rows
        channels = tl.arange(0, BLOCK)
        mask = channels < C
        scale = tl.load(scale_ptr + batch * stride_sb + channels, mask, 0.0)
        dshift = tl.zeros((BLOCK,), tl.float32)
        dscale = tl.zeros((BLOCK,), tl.float32)
        if RESIDUAL:
            gate = tl.load(gate_ptr + batch * stride_gb + channels, mask, 0.0)
            dgate = tl.zeros((BLOCK,), tl.float32)
        for row in range(start, tl.minimum(start + rows, N)):
            offsets = (batch * N + row) * C + channels
            dout = tl.load(dout_ptr + offsets, mask, 0.0).to(tl.float32)
            h = tl.load(h_ptr + batch * stride_hb + row * stride_hn + channels, mask, 0.0).to(tl.float32)
            h = tl.where(mask, h - tl.sum(h) / C, 0.0)
            r = tl.rsqrt(tl.sum(h * h) / C + 1e-6)
            n = h * r
            dshift += dout
            dscale += dout * n
            m = (1 + scale.to(tl.float32)) * dout
            dx = r * (m - tl.sum(m) / C - n * (tl.sum(m * n) / C))
            if RESIDUAL:
                dx += tl.load(dh_ptr + offsets, mask, 0.0).to(tl.float32)
                y = tl.load(y_ptr + batch * stride_yb + row * stride_yn + channels, mask, 0.0).to(tl.float32)
                dgate += dx * y
                tl.store(dy_ptr + offsets, (dx * gate.to(tl.float32)).to(dy_ptr.dtype.element_ty), mask)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
        programs = tl.num_programs(0)
        dmod_ptrs = dmod_ptr + (batch * programs + tl.program_id(0)) * C + channels
        part = tl.num_programs(1) * programs * C
        tl.store(dmod_ptrs, dshift, mask)
        tl.store(dmod_ptrs + part, dscale, mask)
        if RESIDUAL:
            tl.store(dmod_ptrs + 2 * part, dgate, mask)


def _launch(x: Tensor) -> tuple[tuple[int, int], int, dict]:
    """Grid, tokens per program and configuration for x (B, N, C). The kernels only stream memory, so one rule serves
    every GPU: 16 values a thread, and about 512 programs so that each reads its modulation once for several tokens."""
    B, N, C = x.shape
    block = triton.next_power_of_2(C)
    rows = min(16, triton.next_power_of_2(triton.cdiv(N, 512)))
    return (triton.cdiv(N, rows), B), rows, dict(C=C, BLOCK=block, num_warps=min(16, max(1, block // 512)))


def _check(rows: list[Tensor], mods: list[Tensor]) -> None:
    B, N, C = rows[0].shape
    assert C % 8 == 0 and 8 <= C <= 8192, f"Width {C} is not a multiple of 8 up to 8192; use the reference."
    for x in rows:
        assert x.shape == (B, N, C) and x.dtype == rows[0].dtype, "x and y must agree in shape and dtype."
    for x in mods:
        assert x.shape == (B, 1, C), f"Modulations must be ({B}, 1, {C}), got {tuple(x.shape)}."
    for x in rows + mods:
        size = x.element_size()
        assert x.stride(-1) == 1, "The last dimension must be contiguous."
        assert x.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in x.stride()[:-1]), (
            "Rows must begin at multiples of 16 bytes, so that threads read 128 bits at a time; make it contiguous."
        )


@torch.library.custom_op("spatialdiff::modulate", mutates_args=())
def modulate_triton(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As modulate_reference. Views of wider tensors are read as they are."""
    _check([x], [shift, scale])
    out = _rows(x)
    grid, rows, meta = _launch(x)
    modulate_forward[grid](
        x, None, None, shift, scale, None, out, x.shape[1], rows,
        x.stride(0), x.stride(1), 0, 0, 0, shift.stride(0), scale.stride(0), RESIDUAL=False, **meta,
    )  # fmt: skip
    return out


@torch.library.custom_op("spatialdiff::residual_modulate", mutates_args=())
def residual_modulate_triton(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As residual_modulate_reference. Views of wider tensors are read as they are."""
    _check([x, y], [gate, shift, scale])
    h, out = _rows(x), _rows(x)
    grid, rows, meta = _launch(x)
    modulate_forward[grid](
        x, gate, y, shift, scale, h, out, x.shape[1], rows,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0), shift.stride(0), scale.stride(0),
        RESIDUAL=True, **meta,
    )  # fmt: skip
    return h, out


@torch.library.custom_op("spatialdiff::modulate_backward", mutates_args=())
def _backward(
    dh: Tensor | None, dout: Tensor, h: Tensor, gate: Tensor | None, y: Tensor | None, scale: Tensor
) -> list[Tensor]:
    """dx, dshift, dscale and, with a residual, dy, dgate."""
    grid, rows, meta = _launch(h)
    B, N, C = h.shape
    dx, dy = _rows(h), None if y is None else _rows(h)
    dmod = torch.empty(2 if y is None else 3, B, grid[0], C, dtype=torch.float32, device=h.device)
    modulate_backward[grid](
        dh, dout, h, gate, y, scale, dx, dy, dmod, N, rows, h.stride(0), h.stride(1),
        *((0, 0, 0) if y is None else (y.stride(0), y.stride(1), gate.stride(0))), scale.stride(0),
        RESIDUAL=y is not None, **meta,
    )  # fmt: skip
    dshift, dscale, *dgate = dmod.sum(2, keepdim=True).type_as(scale)
    return [dx, dshift, dscale] if y is None else [dx, dshift, dscale, dy, *dgate]


def _rows(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@modulate_triton.register_fake
def _(x, shift, scale):
    return _rows(x)


@residual_modulate_triton.register_fake
def _(x, gate, y, shift, scale):
    return _rows(x), _rows(x)


@_backward.register_fake
def _(dh, dout, h, gate, y, scale):
    grads = [_rows(h), _rows(scale), _rows(scale)]
    return grads if y is None else [*grads, _rows(h), _rows(scale)]


def _setup_modulate(ctx, inputs, output):
    x, _, scale = inputs
    ctx.save_for_backward(x, scale)


def _autograd_modulate(ctx, dout):
    x, scale = ctx.saved_tensors
    return tuple(_backward(None, dout.contiguous(), x, None, None, scale))


def _setup_residual(ctx, inputs, output):
    _, gate, y, _, scale = inputs
    ctx.save_for_backward(output[0], gate, y, scale)


def _autograd_residual(ctx, dh, dout):
    h, gate, y, scale = ctx.saved_tensors
    dx, dshift, dscale, dy, dgate = _backward(dh.contiguous(), dout.contiguous(), h, gate, y, scale)
    return dx, dgate, dy, dshift, dscale


modulate_triton.register_autograd(_autograd_modulate, setup_context=_setup_modulate)
residual_modulate_triton.register_autograd(_autograd_residual, setup_context=_setup_residual)
