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

from kernels.backend import tl, triton

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q (B, N, H, D), k and v (B, M, H, D) -> (B, N, H, D).

    key_mask (B, M) bool: True where a key takes part. A row without keys gives 0.
    """
    mask = None if key_mask is None else key_mask[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    if v.is_cpu and v.dtype == torch.bfloat16 and torch.is_grad_enabled() and k.shape[2] <= 512 and mask is None:
        # torch's fused CPU backward is slow in bf16; short sequences afford the score matrix (3.5 x faster there)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        out = scores.softmax(dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


if triton is not None:
    # Sizes and strides at entry of all three kernels: Q, OUT, DOUT, DQ (B, N, H, D); K, V, DK, DV (B, M, H, D), each
    # with strides of batch, row and head (b, n, h) in elements, channels packed; LSE, DELTA (B, H, N)
    # packed fp32; BIAS None or (B, M up to a multiple of 128) packed fp32: 0 for a key that takes part, else -inf.
    # Grid: (blocks of rows, B * H). What a loop walks over may be a tensor descriptor instead of a pointer. EVEN: the
    # loop's length is a multiple of its block. Else the ragged tail is peeled off, the second turn of `for TAIL`, so
    # that the loop itself masks nothing.

    @triton.jit
    def _load(X, b, h, start, rows, limit, x_b, x_n, x_h, D: tl.constexpr, TAIL: tl.constexpr):
        """X[b, start + rows, h] -> (len(rows), D); with TAIL, rows beyond `limit` are zeros."""
        if isinstance(X, tl.tensor_descriptor):  # copied by the tensor memory accelerator of sm_90 and later
            return X.load([b, start, h, 0]).reshape(rows.shape[0], D)
        else:
            at = X + b.to(tl.int64) * x_b + h * x_h + start * x_n + (rows[:, None] * x_n + tl.arange(0, D)[None, :])
            return tl.load(at, mask=(start + rows < limit)[:, None], other=0.0) if TAIL else tl.load(at)

    @triton.jit
    def _store(X, x, b, h, start, rows, limit, x_b, x_n, x_h, D: tl.constexpr):
        X += b.to(tl.int64) * x_b + h * x_h + start * x_n
        offs = rows[:, None] * x_n + tl.arange(0, D)[None, :]
        tl.store(X + offs, x.to(X.dtype.element_ty), mask=(start + rows < limit)[:, None])

    @triton.jit
    def _mask(s, BIAS, b, keys, M, TAIL: tl.constexpr):
        """Scores (rows, keys) -> -inf where a key is beyond M or masked."""
        if BIAS is not None:
            s += tl.load(BIAS + b * tl.cdiv(M, 128) * 128 + keys)[None, :]
        elif TAIL:
            s = tl.where((keys < M)[None, :], s, float("-inf"))
        return s

    @triton.jit
    def _forward(
        Q, K, V, BIAS, OUT, LSE, N, M, H,
        q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, scale,
        D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        b, h, first = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(0) * BLOCK_M
        rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        q = _load(Q, b, h, first, rows, N, q_b, q_n, q_h, D, True)
        acc = tl.zeros((BLOCK_M, D), tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)
        m = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a row without keys must not make inf - inf
        full = M if EVEN else M // BLOCK_N * BLOCK_N
        for TAIL in tl.static_range(1 if EVEN else 2):
            for start in tl.range(full if TAIL else 0, M if TAIL else full, BLOCK_N):
                k = _load(K, b, h, start, keys, M, k_b, k_n, k_h, D, TAIL)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
                s = _mask(s, BIAS, b, start + keys, M, TAIL)
                m_new = tl.maximum(m, tl.max(s, 1) * scale)
                p = tl.exp2(s * scale - m_new[:, None])
                alpha = tl.exp2(m - m_new)
                l = l * alpha + tl.sum(p, 1)
                acc = acc * alpha[:, None]
                v = _load(V, b, h, start, keys, M, v_b, v_n, v_h, D, TAIL)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                m = m_new
        out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
        lse = tl.where(l == 0.0, float("inf"), m + tl.log2(l))  # inf: the backward pass finds p = 0 there
        _store(OUT, out, b, h, first, rows, N, o_b, o_n, o_h, D)
        tl.store(LSE + tl.program_id(1).to(tl.int64) * N + first + rows, lse, mask=first + rows < N)

    @triton.jit
    def _dq(
        Q, K, V, BIAS, OUT, DOUT, LSE, DELTA, DQ, N, M, H,
        q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, scale, grad_scale,
        D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        b, h, first = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(0) * BLOCK_M
        rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        q = _load(Q, b, h, first, rows, N, q_b, q_n, q_h, D, True)
        do = _load(DOUT, b, h, first, rows, N, o_b, o_n, o_h, D, True)
        out = _load(OUT, b, h, first, rows, N, o_b, o_n, o_h, D, True)
        offs = tl.program_id(1).to(tl.int64) * N + first + rows
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(DELTA + offs, delta, mask=first + rows < N)
        lse = tl.load(LSE + offs, mask=first + rows < N, other=float("inf"))
        dq = tl.zeros((BLOCK_M, D), tl.float32)
        full = M if EVEN else M // BLOCK_N * BLOCK_N
        for TAIL in tl.static_range(1 if EVEN else 2):
            for start in tl.range(full if TAIL else 0, M if TAIL else full, BLOCK_N):
                k = _load(K, b, h, start, keys, M, k_b, k_n, k_h, D, TAIL)
                v = _load(V, b, h, start, keys, M, v_b, v_n, v_h, D, TAIL)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
                s = _mask(s, BIAS, b, start + keys, M, TAIL)  # s = 0 of a padded key: exp2(0 - lse) may overflow
                p = tl.exp2(s * scale - lse[:, None])
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        _store(DQ, dq * grad_scale, b, h, first, rows, N, o_b, o_n, o_h, D)

    @triton.jit
    def _dkdv(
        Q, K, V, BIAS, DOUT, LSE, DELTA, DK, DV, N, M, H,
        q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, g_b, g_n, g_h, scale, grad_scale,
        D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        b, h, first = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(0) * BLOCK_N
        rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        k = _load(K, b, h, first, keys, M, k_b, k_n, k_h, D, True)
        v = _load(V, b, h, first, keys, M, v_b, v_n, v_h, D, True)
        LSE += tl.program_id(1).to(tl.int64) * N
        DELTA += tl.program_id(1).to(tl.int64) * N
        dk, dv = tl.zeros((BLOCK_N, D), tl.float32), tl.zeros((BLOCK_N, D), tl.float32)
        full = N if EVEN else N // BLOCK_M * BLOCK_M
        for TAIL in tl.static_range(1 if EVEN else 2):
            for start in tl.range(full if TAIL else 0, N if TAIL else full, BLOCK_M):
                i = start + rows
                q = _load(Q, b, h, start, rows, N, q_b, q_n, q_h, D, TAIL)
                lse = tl.load(LSE + i, mask=i < N, other=float("inf")) if TAIL else tl.load(LSE + i)
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # transposed: (BLOCK_N, BLOCK_M)
                p = tl.exp2(s * scale - lse[None, :])  # 0 in rows beyond N, where lse = inf
                do = _load(DOUT, b, h, start, rows, N, o_b, o_n, o_h, D, TAIL)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                delta = tl.load(DELTA + i, mask=i < N, other=0.0) if TAIL else tl.load(DELTA + i)
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if BIAS is not None:  # a masked key has met nothing but its own row: of no matter what it holds
            takes_part = tl.load(BIAS + b * tl.cdiv(M, 128) * 128 + first + keys)[:, None] == 0.0
            dk, dv = tl.where(takes_part, dk, 0.0), tl.where(takes_part, dv, 0.0)
        _store(DK, dk * grad_scale, b, h, first, keys, M, g_b, g_n, g_h, D)
        _store(DV, dv, b, h, first, keys, M, g_b, g_n, g_h, D)


# {GPU family: {kernel: (BLOCK_M, BLOCK_N, warps, stages)}} for 16-bit tensors: a static table, so nothing is timed at
# run time. Chosen by compiling ahead of time: no spills, the largest share of the main loop in the matrix units.
CONFIGS = {
    "sm_80": {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 3), "dkdv": (64, 64, 8, 3)},
    "sm_86": {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 3), "dkdv": (64, 64, 8, 2)},  # and 89, 120: 99 KB of shared memory
    "sm_90": {"forward": (128, 128, 8, 2), "dq": (128, 128, 8, 2), "dkdv": (64, 128, 8, 3)},
    "sm_100": {"forward": (128, 128, 8, 2), "dq": (128, 128, 8, 2), "dkdv": (64, 128, 8, 3)},
    "amd": {"forward": (128, 64, 4, 2), "dq": (64, 32, 4, 2), "dkdv": (32, 64, 4, 2)},
    "interpreter": {"forward": (64, 32, 4, 1), "dq": (64, 32, 4, 1), "dkdv": (32, 64, 4, 1)},
}
# No matrix units in "ieee"; dq still spills 50 to 70 registers. fp32 is for checking: torch's attention is faster.
CONFIG_FP32 = {"forward": (32, 32, 8, 1), "dq": (32, 32, 8, 1), "dkdv": (32, 32, 8, 1)}


def gpu_family() -> str:
    """Row of CONFIGS for the current device."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "amd"
    return {80: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(target.arch, "sm_86")


def _config(name: str, q: Tensor) -> tuple[int, int, int, int]:
    return (CONFIG_FP32 if q.dtype == torch.float32 else CONFIGS[gpu_family()])[name]


def _walked(x: Tensor, block: int) -> "Tensor | TensorDescriptor":
    """x as its kernel's loop reads it. By pointers, addresses alone would spill registers on sm_90."""
    if gpu_family() in ("sm_90", "sm_100"):
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block, 1, x.shape[3]])
    return x


def _bias(key_mask: Tensor | None) -> Tensor | None:
    if key_mask is None:
        return None
    bias = F.pad(torch.zeros_like(key_mask, dtype=torch.float32), (0, -key_mask.shape[1] % 128), value=-math.inf)
    bias[:, : key_mask.shape[1]].masked_fill_(~key_mask, -math.inf)
    return bias


def _launch(kernel, name: str, q: Tensor, rows: int, block: int, even: bool, *args) -> None:
    block_m, block_n, warps, stages = _config(name, q)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # says nothing to 16-bit products
    kernel[triton.cdiv(rows, block), q.shape[0] * q.shape[2]](
        *args, q.shape[3], block_m, block_n, even, precision, num_warps=warps, num_stages=stages
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
        steps = [stride * x.element_size() for stride in x.stride()[:3]]
        assert not any(step % 16 for step in steps), f"The strides of {name} must be multiples of 16 bytes, not {steps}."
        assert x.data_ptr() % 16 == 0, f"{name} must start at a multiple of 16 bytes."
        assert x.shape[1] * x.stride(1) < 2**31, f"{name} is too long: offsets within a sample are 32-bit."
    if key_mask is not None:
        found = f"{key_mask.dtype} {tuple(key_mask.shape)}"
        assert key_mask.shape == (B, M) and key_mask.dtype == torch.bool, f"key_mask must be bool {(B, M)}, not {found}."


def attention_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> out (B, N, H, D) and lse (B, H, N) fp32, base 2."""
    _check(q, k, v, key_mask)
    (B, N, H, D), M = q.shape, k.shape[1]
    out, lse = q.new_empty(B, N, H, D), q.new_empty(B, H, N, dtype=torch.float32)
    bias = _bias(key_mask)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    block_m, block_n, *_ = _config("forward", q)
    args = q, _walked(k, block_n), _walked(v, block_n), bias, out, lse, N, M, H, *strides, D**-0.5 * math.log2(math.e)
    _launch(_forward, "forward", q, N, block_m, M % block_n == 0, *args)
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, contiguous."""
    (B, N, H, D), M = q.shape, k.shape[1]
    dout = dout.contiguous()  # the kernels use the strides of out, which is contiguous
    dq, dk, dv, delta = torch.empty_like(out), *(q.new_empty(B, M, H, D) for _ in "kv"), torch.empty_like(lse)
    bias = _bias(key_mask)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    scales = D**-0.5 * math.log2(math.e), D**-0.5
    block_m, block_n, *_ = _config("dq", q)
    args = q, _walked(k, block_n), _walked(v, block_n), bias, out, dout, lse, delta, dq, N, M, H, *strides, *scales
    _launch(_dq, "dq", q, N, block_m, M % block_n == 0, *args)
    block_m, block_n, *_ = _config("dkdv", q)
    strides += dk.stride()[:3]
    args = _walked(q, block_m), k, v, bias, _walked(dout, block_m), lse, delta, dk, dv, N, M, H, *strides, *scales
    _launch(_dkdv, "dkdv", q, M, block_n, N % block_m == 0, *args)
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


if triton is not None:
    from torch.utils.flop_counter import register_flop_formula  # a slow import

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
