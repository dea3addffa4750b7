"""The attention kernels against float64, in Triton's interpreter.     python -m pytest tests/test_attention.py"""

import math
import sys

import interpreter  # noqa: F401  (bf16 and tf32 as a GPU computes them)
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import attention_reference, attention_triton

TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
attention = sys.modules["kernels.attention"]  # the module: the package has a function of that name
FAMILIES = ("interpreter", "sm_90")  # pointers in small blocks, descriptors in a GPU's blocks
PAD = 4096  # elements of NaN on each side of every buffer: rows beyond the end fall into them


def exact(q, k, v, dout, key_mask=None):
    """o, dq, dk, dv in float64 by the formulas, not by autograd."""
    q, k, v, do = (x.detach().double().transpose(1, 2) for x in (q, k, v, dout))
    c = q.shape[-1] ** -0.5
    s = c * q @ k.mT
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None], -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp().nan_to_num(0.0)  # a row without keys: -inf - -inf
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-300)
    o, dp = p @ v, do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return [x.transpose(1, 2) for x in (o, c * ds @ k, c * ds.mT @ q, p.mT @ do)]


def guarded(shape, dtype, generator=None, scale=1.0):
    """A tensor in the middle of a buffer of NaN, 16-byte aligned; random if a generator is given. Returns both."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * PAD,), torch.nan, dtype=dtype)
    x = buffer[PAD : PAD + size].view(shape)
    if generator is not None:
        x.copy_(torch.randn(shape, generator=generator) * scale)
    return x, buffer


def joint(batch, n, heads, width, parts, dtype, generator, scale=1.0):
    """(B, N, H, D) views of one joint buffer whose every other sample and column is NaN."""
    buffer = torch.full((2 * batch + 1, n + 2, 2 * parts + 1, heads, width), torch.nan, dtype=dtype)
    views = [buffer[1::2, 1 : n + 1, 2 * i + 1] for i in range(parts)]
    for x in views:
        x.copy_(torch.randn(x.shape, generator=generator) * scale)
    return views


def run(q, k, v, dout, key_mask=None, function=attention_triton):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, key_mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def sdpa(q, k, v, key_mask=None):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def relative_error(a, b, floor=0.0):
    return ((a.double() - b).abs().max() / b.abs().max().clamp_min(floor)).item()


def compare(found, truth, tolerance, peer=None, slack=1.1, floor=0.0):
    """With `peer` (torch's attention of the same dtype), `slack` times its error is allowed where that is more."""
    for i, (name, a, b) in enumerate(zip(("o", "dq", "dk", "dv"), found, truth)):
        assert a.shape == b.shape and a.isfinite().all(), name
        allowed = max(tolerance, slack * relative_error(peer[i], b, floor) if peer else 0.0)
        error = relative_error(a, b, floor)
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    monkeypatch.setattr(attention, "gpu_family", lambda: request.param)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_writes_stay_inside(family, dtype, monkeypatch):
    """Every output and scratch buffer is allocated inside NaN; what surrounds it stays NaN, all of it is written."""
    buffers, original = [], torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, **device):
        if device:  # the interpreter's own
            return original(self, *shape, dtype=dtype or self.dtype, **device)
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        x, buffer = guarded(shape, dtype or self.dtype)
        buffers.append(buffer)
        return x

    generator = torch.Generator().manual_seed(3)
    q, k, v = (guarded((2, n, 2, 32), dtype, generator)[0] for n in (67, 35, 35))
    dout = guarded(q.shape, dtype, generator)[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty_like", lambda x: new_empty(x, x.shape))
        out, lse = attention.attention_forward(q, k, v)
        gradients = attention.attention_backward(dout, q, k, v, out, lse)
    assert len(buffers) == 6  # out, lse, dq, dk, dv, delta
    for buffer in buffers:
        assert buffer[:PAD].isnan().all() and buffer[-PAD:].isnan().all() and buffer[PAD:-PAD].isfinite().all()
    compare([out, *gradients], exact(q, k, v, dout), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "n, m, width", [(1, 1, 32), (2, 17, 64), (17, 2, 32), (33, 130, 64), (100, 100, 128), (130, 33, 32), (128, 128, 64)]
)
def test_lengths(family, n, m, width, dtype):
    generator = torch.Generator().manual_seed(n + m)
    q, *_ = joint(2, n, 2, width, 3, dtype, generator)
    k, v = joint(2, m, 2, width, 2, dtype, generator)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)  # strides of its own
    dout = torch.randn(2, n, 2, width, generator=generator).to(dtype)
    # ds and the result are both rounded to 16 bits; over few keys that does not average out, for torch as for us.
    # With a single key dq and dk are 0 in theory: their error is measured against 1.
    peer = run(q, k, v, dout, function=sdpa) if dtype != torch.float32 and min(n, m) < 100 else None
    compare(run(q, k, v, dout), exact(q, k, v, dout), TOLERANCE[dtype], peer, floor=1.0 if m == 1 else 0.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_key_mask(family, dtype):
    """Masked keys scattered and at the end, a sample without padding, one with no keys at all."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = joint(4, 70, 2, 32, 3, dtype, generator)
    dout = torch.randn(q.shape, generator=generator).to(dtype)
    key_mask = torch.ones(4, 70, dtype=torch.bool)
    key_mask[1, 41:] = False
    key_mask[2] = torch.rand(70, generator=generator) < 0.5
    key_mask[3] = False
    found = run(q, k, v, dout, key_mask)
    compare(found, exact(q, k, v, dout, key_mask), TOLERANCE[dtype])
    assert not any(x[3].any() for x in found)  # no keys: zeros
    assert not any(x[~key_mask].any() for x in found[2:])  # nothing flows to a masked key
    short = run(*(x[1:2, :n] for x, n in zip((q, k, v, dout), (70, 41, 41, 70))))  # masked equals absent
    compare([x[1:2, :41] if i > 1 else x[1:2] for i, x in enumerate(found)], [x.double() for x in short], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shift", [0, 250, -250])
def test_extreme_logits(family, dtype, shift):
    """Logits of standard deviation 30; or all near +-250, where 2^(0 - lse) of a padded key overflows.

    The exponent is an fp32 number of some hundreds in torch as here: its last place is allowed as a relative error of p.
    """
    generator = torch.Generator().manual_seed(2)
    q, k, v = joint(1, 67, 2, 64, 3, dtype, generator, scale=1.0 if shift else 30**0.5)
    if shift:
        q[..., :8], k[..., :8] = 16.0, shift / 16.0  # 8 x 16 x shift / 16 / sqrt(64) = shift
    dout = torch.randn(q.shape, generator=generator).to(dtype)
    exponent = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).abs().max().item() / 64**0.5 * math.log2(math.e)
    tolerance = max(TOLERANCE[dtype], exponent * torch.finfo(torch.float32).eps)
    peer = run(q, k, v, dout, function=sdpa)
    compare(run(q, k, v, dout), exact(q, k, v, dout), tolerance, peer, slack=2.0)


def test_reference():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, n, 3, 32, dtype=torch.float64, generator=generator).requires_grad_() for n in (9, 7, 7))
    key_mask = torch.rand(2, 7, generator=generator) < 0.7
    key_mask[1] = False
    dout = torch.randn(q.shape, dtype=torch.float64, generator=generator)
    out = attention_reference(q, k, v, key_mask)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    compare([out.detach(), *gradients], exact(q, k, v, dout, key_mask), 1e-12)


def small(n=5, m=7, width=32, requires_grad=True):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, x, 2, width, generator=generator).requires_grad_(requires_grad) for x in (n, m, m)]


def test_custom_op():
    key_mask = torch.arange(7)[None] < 5
    torch.library.opcheck(torch.ops.spatialdiff.attention.default, (*small(), None))
    torch.library.opcheck(torch.ops.spatialdiff.attention.default, (*small(), key_mask))
    q, k, v = small(requires_grad=False)
    args = (torch.randn_like(q), q, k, v, *attention.attention_forward(q, k, v, key_mask), key_mask)
    torch.library.opcheck(torch.ops.spatialdiff.attention_backward.default, args)


def test_gradcheck():
    assert torch.autograd.gradcheck(attention_triton, small(), eps=1e-2, atol=2e-3, rtol=2e-3, fast_mode=True)


def test_compile_and_checkpoint():
    """In a compiled graph and recomputed in the backward pass: the same bits."""
    torch.manual_seed(0)
    buffer = torch.randn(1, 7, 3, 2, 32, requires_grad=True)
    loss = lambda x: attention_triton(*x.unbind(2)).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(buffer), buffer)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(buffer), buffer)[0], expected)
    recomputed = checkpoint(loss, buffer, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(recomputed, buffer)[0], expected)


def test_meta_tensors_and_flops():
    q, k, v = torch.empty(1, 3584, 3, 24, 128, dtype=torch.bfloat16, device="meta", requires_grad=True).unbind(2)
    with FlopCounterMode(display=False) as counter:
        out = attention_triton(q, k, v)
        assert out.shape == q.shape and out.is_contiguous()
        out.backward(torch.empty_like(out))
    assert counter.get_total_flops() == 14 * 24 * 3584**2 * 128


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda q, k, v: (q[..., :16], k[..., :16], v[..., :16]), "head width must be 32, 64 or 128, not 16"),
        (lambda q, k, v: (q, k[:, :3], v), "Expected k, v"),
        (lambda q, k, v: (q, k.half(), v), "one dtype"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "No attention kernel for torch.float64"),
        (lambda q, k, v: (q, k, v.transpose(2, 3).contiguous().transpose(2, 3)), "last dimension of v must be contiguous"),
        (lambda q, k, v: (q, k, torch.empty(1, 7, 2, 33)[..., :32]), "strides of v must be multiples of 16 bytes"),
        (lambda q, k, v: (q, k, torch.empty(v.numel() + 1)[1:].view(v.shape)), "v must start at a multiple of 16 bytes"),
        (lambda q, k, v: (q, k, v, torch.ones(1, 6, dtype=torch.bool)), "key_mask must be bool"),
    ],
)
def test_refuses(change, sentence):
    with pytest.raises(AssertionError, match=sentence):
        attention_triton(*change(*small(requires_grad=False)))
