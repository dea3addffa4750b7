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

from kernels.backend import tl, triton


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LayerNorm(x) + shift for x (B, N, C); shift, scale (B, 1, C)."""
    h, shift, scale = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, shift, scale))
    if x.shape[0] == 1:  # then they are LayerNorm's own weight and bias: one pass instead of three
        return F.layer_norm(h, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), 1e-6).type_as(x)
    return torch.addcmul(shift, 1 + scale, F.layer_norm(h, x.shape[-1:], eps=1e-6)).type_as(x)


def residual_modulate_reference(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """h = x + gate y and modulate(h): x, y (B, N, C); gate, shift, scale (B, 1, C)."""
    h = torch.addcmul(x, gate, y)
    return h, modulate_reference(h, shift, scale)


if triton is not None:

    @triton.jit
    def load_row(ptr, offset, mask):
        return tl.load(ptr + offset + tl.arange(0, mask.shape[0]), mask, 0.0).to(tl.float32)

    @triton.jit
    def store_row(ptr, offset, x, mask):
        tl.store(ptr + offset + tl.arange(0, mask.shape[0]), x.to(ptr.dtype.element_ty), mask)

    @triton.jit
    def normalize(h, mask, C: tl.constexpr):
        h = tl.where(mask, h - tl.sum(h) / C, 0.0)
        r = tl.rsqrt(tl.sum(h * h) / C + 1e-6)
        return h * r, r

    @triton.jit
    def modulate_forward(
        x_ptr, gate_ptr, y_ptr, shift_ptr, scale_ptr, h_ptr, out_ptr,
        N,
        stride_xb, stride_xn, stride_yb, stride_yn, stride_gb, stride_bb, stride_sb,
        C: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
    ):  # fmt: skip
        # x, y (B, N, C): strides (stride_b, stride_n, 1); gate, shift, scale (B, 1, C): (stride_gb | bb | sb, -, 1);
        # h, out (B, N, C) contiguous. program: a token; the modulation comes from L1 for all but the first of an SM
        row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
        mask = tl.arange(0, BLOCK) < C  # constexpr C: the compiler sees that it cuts no 16 bytes in two
        h = load_row(x_ptr, batch * stride_xb + row * stride_xn, mask)
        if RESIDUAL:
            gate = load_row(gate_ptr, batch * stride_gb, mask)
            h += gate * load_row(y_ptr, batch * stride_yb + row * stride_yn, mask)
            h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
            store_row(h_ptr, (batch * N + row) * C, h, mask)
        n, _ = normalize(h, mask, C)
        shift = load_row(shift_ptr, batch * stride_bb, mask)
        scale = load_row(scale_ptr, batch * stride_sb, mask)
        store_row(out_ptr, (batch * N + row) * C, (1 + scale) * n + shift, mask)

    @triton.jit
    def modulate_backward(
        dh_ptr, dout_ptr, h_ptr, gate_ptr, y_ptr, scale_ptr, dx_ptr, dy_ptr, dmod_ptr,
        N, rows,
        stride_hb, stride_hn, stride_yb, stride_yn, stride_gb, stride_sb,
        C: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
    ):  # fmt: skip
        # as forward; dh, dout, dx, dy (B, N, C) contiguous; dmod (3 or 2, B, programs, C) fp32 contiguous: each
        # program's dshift, dscale, dgate. program: `rows` tokens of a sample
        batch = tl.program_id(1).to(tl.int64)
        mask = tl.arange(0, BLOCK) < C
        dshift = tl.zeros((BLOCK,), tl.float32)
        dscale = tl.zeros((BLOCK,), tl.float32)
        dgate = tl.zeros((BLOCK,), tl.float32)
        start = tl.program_id(0) * rows
        for row in range(start, tl.minimum(start + rows, N)):
            dout = load_row(dout_ptr, (batch * N + row) * C, mask)
            n, r = normalize(load_row(h_ptr, batch * stride_hb + row * stride_hn, mask), mask, C)
            dshift += dout
            dscale += dout * n
            m = (1 + load_row(scale_ptr, batch * stride_sb, mask)) * dout
            dx = r * (m - tl.sum(m) / C - n * (tl.sum(m * n) / C))
            if RESIDUAL:
                dx += load_row(dh_ptr, (batch * N + row) * C, mask)
                dgate += dx * load_row(y_ptr, batch * stride_yb + row * stride_yn, mask)
                dy = dx * load_row(gate_ptr, batch * stride_gb, mask)
                store_row(dy_ptr, (batch * N + row) * C, dy, mask)
            store_row(dx_ptr, (batch * N + row) * C, dx, mask)
        part = tl.num_programs(1) * tl.num_programs(0) * C
        offset = (batch * tl.num_programs(0) + tl.program_id(0)) * C
        store_row(dmod_ptr, offset, dshift, mask)
        store_row(dmod_ptr, offset + part, dscale, mask)
        if RESIDUAL:
            store_row(dmod_ptr, offset + 2 * part, dgate, mask)


def _meta(C: int) -> dict:
    """The kernels only stream memory, so one configuration serves every GPU: 16 values a thread."""
    block = triton.next_power_of_2(C)
    return dict(C=C, BLOCK=block, num_warps=min(16, max(1, block // 512)))


def _check(rows: list[Tensor], mods: list[Tensor]) -> None:
    B, N, C = rows[0].shape
    assert C % 8 == 0 and 8 <= C <= 8192, f"Width {C} is not a multiple of 8 up to 8192; use the reference."
    for x in rows:
        assert x.shape == (B, N, C) and x.dtype == rows[0].dtype, "x and y must agree in shape and dtype."
    for x in mods:
        assert x.shape == (B, 1, C), f"Modulations must be ({B}, 1, {C}), got {tuple(x.shape)}."
    for x in rows + mods:
        assert x.stride(-1) == 1, "The last dimension must be contiguous."
        assert x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1]), (
            "Rows must begin at multiples of 16 bytes and 8 elements (128-bit accesses); make the tensor contiguous."
        )


@torch.library.custom_op("spatialdiff::modulate", mutates_args=())
def modulate_triton(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As modulate_reference. Views of wider tensors are read as they are."""
    _check([x], [shift, scale])
    out = _rows(x)
    B, N, C = x.shape
    modulate_forward[(N, B)](
        x, None, None, shift, scale, None, out, N,
        x.stride(0), x.stride(1), 0, 0, 0, shift.stride(0), scale.stride(0), RESIDUAL=False, **_meta(C),
    )  # fmt: skip
    return out


@torch.library.custom_op("spatialdiff::residual_modulate", mutates_args=())
def residual_modulate_triton(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As residual_modulate_reference. Views of wider tensors are read as they are."""
    _check([x, y], [gate, shift, scale])
    h, out = _rows(x), _rows(x)
    B, N, C = x.shape
    modulate_forward[(N, B)](
        x, gate, y, shift, scale, h, out, N,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0), shift.stride(0), scale.stride(0),
        RESIDUAL=True, **_meta(C),
    )  # fmt: skip
    return h, out


@torch.library.custom_op("spatialdiff::modulate_backward", mutates_args=())
def _backward(
    dh: Tensor | None, dout: Tensor, h: Tensor, gate: Tensor | None, y: Tensor | None, scale: Tensor
) -> list[Tensor]:
    """dx, dshift, dscale and, with a residual, dy, dgate."""
    B, N, C = h.shape
    rows = min(16, triton.next_power_of_2(triton.cdiv(N, 512)))  # about 512 programs: enough for any GPU, few partials
    grid = (triton.cdiv(N, rows), B)
    dx, dy = _rows(h), None if y is None else _rows(h)
    dmod = torch.empty(2 if y is None else 3, B, grid[0], C, dtype=torch.float32, device=h.device)
    modulate_backward[grid](
        dh, dout, h, gate, y, scale, dx, dy, dmod, N, rows, h.stride(0), h.stride(1),
        *((0, 0, 0) if y is None else (y.stride(0), y.stride(1), gate.stride(0))), scale.stride(0),
        RESIDUAL=y is not None, **_meta(C),
    )  # fmt: skip
    dshift, dscale, *dgate = (part.sum(1, keepdim=True).type_as(scale) for part in dmod)
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
