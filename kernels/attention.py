"""Attention without N x M memory, forward and backward, as three Triton kernels.

For one head, with c = 1 / sqrt(D) and rows i of queries, j of keys:

    s_ij = c q_i . k_j        lse_i = log sum_j exp s_ij        p_ij = exp(s_ij - lse_i)        o_i = sum_j p_ij v_j

Forward (online softmax, Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023): a program keeps BLOCK_M queries and
walks over the keys with a running maximum m, sum l and unnormalised output a. A block of scores s updates them by

    m' = max(m, max_j s_ij)     l' = l e^(m - m') + sum_j e^(s_ij - m')     a' = a e^(m - m') + sum_j e^(s_ij - m') v_j

and in the end o = a / l, lse = m + log l. Only o and lse are kept for the backward pass. With do the gradient of o:

    dv_j = sum_i p_ij do_i      dp_ij = do_i . v_j      delta_i = sum_j p_ij dp_ij = o_i . do_i
    ds_ij = p_ij (dp_ij - delta_i)      dq_i = c sum_j ds_ij k_j      dk_j = c sum_i ds_ij q_i

One kernel walks over keys for dq (and writes delta), one over queries for dk and dv. Each recomputes p from lse, which
costs two products more than a single kernel would, and needs no atomics: the same input gives the same bits.

Inside, powers of two replace e (lse is kept in base 2 and log2(e) is folded into c); scores, sums and accumulators are
fp32, p and ds are rounded to the dtype of the tensors for the matrix units, results are rounded once.
A row whose keys are all masked gives o = 0 and zero gradients.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def attention_reference(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q (B, N, H, D), k and v (B, M, H, D) -> (B, N, H, D).

    key_mask (B, M) bool: True where a key takes part. A row without keys gives 0.
    """
    mask = None if key_mask is None else key_mask[:, None, None]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(1, 2)


if triton:
    # Sizes and strides at entry of all three kernels: Q, OUT, DOUT, DQ (B, N, H, D); K, V, DK, DV (B, M, H, D), each
    # with strides of batch, row and head (b, n, h) in elements and channels packed; MASK (B, M) packed or None;
    # LSE, DELTA (B, H, N) packed fp32. Grid: (blocks of rows, B * H).

    @triton.jit
    def _forward_step(
        q, K, V, MASK, keys, M, acc, l, m, offs_k, offs_v, scale, TAIL: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        inside = keys < M
        k = tl.load(K + offs_k, mask=inside[:, None], other=0.0) if TAIL else tl.load(K + offs_k)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASK is not None:
            s = tl.where(tl.load(MASK + keys, mask=inside, other=0)[None, :] != 0, s, float("-inf"))
        elif TAIL:
            s = tl.where(inside[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        v = tl.load(V + offs_v, mask=inside[:, None], other=0.0) if TAIL else tl.load(V + offs_v)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        return acc, l * alpha + tl.sum(p, 1), m_new

    @triton.jit
    def _forward(
        Q, K, V, MASK, OUT, LSE, N, M, H,
        q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, scale,
        D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
        rows, keys, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
        q = tl.load(Q + b * q_b + h * q_h + rows[:, None] * q_n + d[None, :], mask=rows[:, None] < N, other=0.0)
        K += b * k_b + h * k_h
        V += b * v_b + h * v_h
        if MASK is not None:
            MASK += b * M
        offs_k, offs_v = keys[:, None] * k_n + d[None, :], keys[:, None] * v_n + d[None, :]

        acc = tl.zeros((BLOCK_M, D), tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)
        m = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a row without keys must not make inf - inf
        full = M if EVEN else M // BLOCK_N * BLOCK_N
        for start in tl.range(0, full, BLOCK_N):
            acc, l, m = _forward_step(
                q, K, V, MASK, start + keys, M, acc, l, m, offs_k, offs_v, scale, False, PRECISION
            )
            K += BLOCK_N * k_n
            V += BLOCK_N * v_n
        if not EVEN:  # the ragged tail is peeled off so that the loop masks nothing
            acc, l, m = _forward_step(
                q, K, V, MASK, full + keys, M, acc, l, m, offs_k, offs_v, scale, True, PRECISION
            )
        out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
        lse = tl.where(l == 0.0, float("inf"), m + tl.log2(l))  # inf: the backward pass finds p = 0 there
        tl.store(OUT + b * o_b + h * o_h + rows[:, None] * o_n + d[None, :], out.to(q.dtype), mask=rows[:, None] < N)
        tl.store(LSE + tl.program_id(1).to(tl.int64) * N + rows, lse, mask=rows < N)

    @triton.jit
    def _dq_step(
        q, do, lse, delta, K, V, MASK, keys, M, dq, offs_k, offs_v, scale, TAIL: tl.constexpr, PRECISION: tl.constexpr
    ):  # fmt: skip
        inside = keys < M
        k = tl.load(K + offs_k, mask=inside[:, None], other=0.0) if TAIL else tl.load(K + offs_k)
        v = tl.load(V + offs_v, mask=inside[:, None], other=0.0) if TAIL else tl.load(V + offs_v)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASK is not None:
            s = tl.where(tl.load(MASK + keys, mask=inside, other=0)[None, :] != 0, s, float("-inf"))
        elif TAIL:  # a padded key has s = 0, and exp2(0 - lse) may overflow
            s = tl.where(inside[None, :], s, float("-inf"))
        p = tl.exp2(s * scale - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    @triton.jit
    def _dq(
        Q, K, V, MASK, OUT, DOUT, LSE, DELTA, DQ, N, M, H,
        q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, scale, grad_scale,
        D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
        rows, keys, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
        offs_o = b * o_b + h * o_h + rows[:, None] * o_n + d[None, :]
        row_in = rows < N
        q = tl.load(Q + b * q_b + h * q_h + rows[:, None] * q_n + d[None, :], mask=row_in[:, None], other=0.0)
        do = tl.load(DOUT + offs_o, mask=row_in[:, None], other=0.0)
        out = tl.load(OUT + offs_o, mask=row_in[:, None], other=0.0)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        offs_lse = tl.program_id(1).to(tl.int64) * N + rows
        tl.store(DELTA + offs_lse, delta, mask=row_in)
        lse = tl.load(LSE + offs_lse, mask=row_in, other=float("inf"))
        K += b * k_b + h * k_h
        V += b * v_b + h * v_h
        if MASK is not None:
            MASK += b * M
        offs_k, offs_v = keys[:, None] * k_n + d[None, :], keys[:, None] * v_n + d[None, :]

        dq = tl.zeros((BLOCK_M, D), tl.float32)
        full = M if EVEN else M // BLOCK_N * BLOCK_N
        for start in tl.range(0, full, BLOCK_N):
            dq = _dq_step(
                q, do, lse, delta, K, V, MASK, start + keys, M, dq, offs_k, offs_v, scale, False, PRECISION
            )
            K += BLOCK_N * k_n
            V += BLOCK_N * v_n
        if not EVEN:
            dq = _dq_step(
                q, do, lse, delta, K, V, MASK, full + keys, M, dq, offs_k, offs_v, scale, True, PRECISION
            )
        tl.store(DQ + offs_o, (dq * grad_scale).to(q.dtype), mask=row_in[:, None])

    @triton.jit
    def _dkdv_step(
        k, v, takes_part, Q, DOUT, LSE, DELTA, rows, N, dk, dv, offs_q, offs_o, scale,
        MASKED: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        row_in = rows < N
        q = tl.load(Q + offs_q, mask=row_in[:, None], other=0.0) if TAIL else tl.load(Q + offs_q)
        lse = tl.load(LSE + rows, mask=row_in, other=float("inf")) if TAIL else tl.load(LSE + rows)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # transposed: (BLOCK_N, BLOCK_M)
        if MASKED:
            s = tl.where(takes_part[:, None], s, float("-inf"))
        p = tl.exp2(s * scale - lse[None, :])  # 0 in rows beyond N, where lse = inf
        do = tl.load(DOUT + offs_o, mask=row_in[:, None], other=0.0) if TAIL else tl.load(DOUT + offs_o)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        delta = tl.load(DELTA + rows, mask=row_in, other=0.0) if TAIL else tl.load(DELTA + rows)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        return dk, dv

    @triton.jit
    def _dkdv(
        Q, K, V, MASK, DOUT, LSE, DELTA, DK, DV, N, M, H,
        q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, g_b, g_n, g_h, scale, grad_scale,
        D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
        keys, rows, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, D)
        key_in = keys < M
        k = tl.load(K + b * k_b + h * k_h + keys[:, None] * k_n + d[None, :], mask=key_in[:, None], other=0.0)
        v = tl.load(V + b * v_b + h * v_h + keys[:, None] * v_n + d[None, :], mask=key_in[:, None], other=0.0)
        takes_part = key_in
        if MASK is not None:
            takes_part = tl.load(MASK + b * M + keys, mask=key_in, other=0) != 0
        Q += b * q_b + h * q_h
        DOUT += b * o_b + h * o_h
        LSE += tl.program_id(1).to(tl.int64) * N
        DELTA += tl.program_id(1).to(tl.int64) * N
        offs_q, offs_o = rows[:, None] * q_n + d[None, :], rows[:, None] * o_n + d[None, :]

        dk, dv = tl.zeros((BLOCK_N, D), tl.float32), tl.zeros((BLOCK_N, D), tl.float32)
        full = N if EVEN else N // BLOCK_M * BLOCK_M
        for start in tl.range(0, full, BLOCK_M):
            dk, dv = _dkdv_step(
                k, v, takes_part, Q, DOUT, LSE, DELTA, start + rows, N, dk, dv, offs_q, offs_o, scale,
                MASK is not None, False, PRECISION,
            )  # fmt: skip
            Q += BLOCK_M * q_n
            DOUT += BLOCK_M * o_n
        if not EVEN:
            dk, dv = _dkdv_step(
                k, v, takes_part, Q, DOUT, LSE, DELTA, full + rows, N, dk, dv, offs_q, offs_o, scale,
                MASK is not None, True, PRECISION,
            )  # fmt: skip
        offs_g = b * g_b + h * g_h + keys[:, None] * g_n + d[None, :]
        tl.store(DK + offs_g, (dk * grad_scale).to(k.dtype), mask=key_in[:, None])
        tl.store(DV + offs_g, dv.to(v.dtype), mask=key_in[:, None])


# {GPU family: {kernel: (BLOCK_M, BLOCK_N, warps, stages)}} for 16-bit tensors: a static table, so nothing is timed at
# run time. Chosen by compiling ahead of time: no spills, the largest share of the main loop in the matrix units.
CONFIGS = {
    "sm_80": {"forward": (128, 64, 8, 2), "dq": (128, 32, 8, 3), "dkdv": (64, 64, 8, 3)},  # and sm_86, 89, 120
    "sm_90": {"forward": (128, 128, 8, 2), "dq": (128, 64, 8, 2), "dkdv": (64, 128, 8, 2)},
    "sm_100": {"forward": (128, 128, 8, 2), "dq": (128, 128, 8, 2), "dkdv": (64, 128, 8, 2)},
    "amd": {"forward": (128, 64, 4, 2), "dq": (64, 32, 4, 2), "dkdv": (32, 64, 4, 2)},
    "interpreter": {"forward": (64, 32, 4, 1), "dq": (64, 32, 4, 1), "dkdv": (32, 64, 4, 1)},
}
CONFIG_FP32 = {"forward": (64, 32, 8, 1), "dq": (64, 32, 8, 1), "dkdv": (32, 64, 8, 1)}  # no matrix units in "ieee"


def gpu_family() -> str:
    """Row of CONFIGS for the current device."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return "amd" if target.backend == "hip" else {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")


def _launch(kernel, name: str, q: Tensor, k: Tensor, *args) -> None:
    block_m, block_n, warps, stages = (CONFIG_FP32 if q.dtype == torch.float32 else CONFIGS[gpu_family()])[name]
    rows, block, loop, step = q.shape[1], block_m, k.shape[1], block_n
    if name == "dkdv":
        rows, block, loop, step = loop, step, rows, block
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # says nothing to 16-bit products
    with torch.cuda.device_of(q):
        kernel[triton.cdiv(rows, block), q.shape[0] * q.shape[2]](
            *args, q.shape[3], block_m, block_n, loop % step == 0, precision, num_warps=warps, num_stages=stages
        )


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    (B, N, H, D), M = q.shape, k.shape[1]
    assert D in (32, 64, 128), f"The head width must be 32, 64 or 128, not {D}."
    assert N > 0 and M > 0, "Attention needs at least one query and one key."
    assert k.shape == v.shape == (B, M, H, D), f"Expected k, v {(B, M, H, D)}, found {tuple(k.shape)}, {tuple(v.shape)}."
    assert q.dtype == k.dtype == v.dtype, f"q, k, v must have one dtype, found {q.dtype}, {k.dtype}, {v.dtype}."
    assert q.dtype in (torch.float32, torch.float16, torch.bfloat16), f"No attention kernel for {q.dtype}."
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert x.stride(3) == 1, f"The last dimension of {name} must be contiguous."
        steps = [stride * x.element_size() for size, stride in zip(x.shape, x.stride()[:3]) if size > 1]
        assert not any(step % 16 for step in steps), f"The strides of {name} must be multiples of 16 bytes, not {steps}."
        assert x.is_meta or x.data_ptr() % 16 == 0, f"{name} must start at a multiple of 16 bytes."
        assert x.shape[1] * x.stride(1) < 2**31, f"{name} is too long: offsets within a sample are 32-bit."
    if key_mask is not None:
        found = f"{key_mask.dtype} {tuple(key_mask.shape)}"
        assert key_mask.shape == (B, M) and key_mask.dtype == torch.bool, f"key_mask must be bool {(B, M)}, not {found}."


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> out (B, N, H, D) and lse (B, H, N) fp32, base 2."""
    _check(q, k, v, key_mask)
    (B, N, H, D), M = q.shape, k.shape[1]
    out, lse = q.new_empty(B, N, H, D), q.new_empty(B, H, N, dtype=torch.float32)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    _launch(_forward, "forward", q, k, q, k, v, mask, out, lse, N, M, H, *strides, D**-0.5 * math.log2(math.e))
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, contiguous."""
    (B, N, H, D), M = q.shape, k.shape[1]
    dout = dout.contiguous()  # the kernels use the strides of out, which is contiguous
    dq, dk, dv, delta = torch.empty_like(out), *(q.new_empty(B, M, H, D) for _ in "kv"), torch.empty_like(lse)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    scales = D**-0.5 * math.log2(math.e), D**-0.5
    _launch(_dq, "dq", q, k, q, k, v, mask, out, dout, lse, delta, dq, N, M, H, *strides, *scales)
    strides += dk.stride()[:3]
    _launch(_dkdv, "dkdv", q, k, q, k, v, mask, dout, lse, delta, dk, dv, N, M, H, *strides, *scales)
    return dq, dk, dv


_attention = torch.library.custom_op("spatialdiff::attention", attention_forward, mutates_args=())
_attention_backward = torch.library.custom_op("spatialdiff::attention_backward", attention_backward, mutates_args=())


@_attention.register_fake
def _(q, k, v, key_mask=None):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, key_mask=None):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, dout, dlse):
    q, k, v, key_mask, out, lse = ctx.saved_tensors
    return *_attention_backward(dout, q, k, v, out, lse, key_mask), None


_attention.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.spatialdiff.attention)
def _flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(q_shape) * k_shape[1]  # two products


@register_flop_formula(torch.ops.spatialdiff.attention_backward)
def _backward_flops(dout_shape, q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    return 10 * math.prod(q_shape) * k_shape[1]  # five; recomputed ones do not count, as for torch's own attention


def attention_triton(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """`attention_reference` by the kernels above: D 32, 64 or 128; any strides that are multiples of 16 bytes.

    Views of one joint buffer are read in place. `qkv.unbind(2)` of a (B, N, 3, H, D) buffer costs one copy in the
    backward pass, three indexings cost three times three.
    """
    return _attention(q, k, v, key_mask)[0]
