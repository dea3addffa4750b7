"""qk_norm_rope against float64: the Triton kernels in the interpreter and the reference, forward and gradients.

    pytest tests/test_rope.py
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.rope import qk_norm_rope_reference, qk_norm_rope_triton

triton = pytest.importorskip("triton")
import interpreter  # noqa: E402, F401

TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
# lengths of the streams, parts, heads, head width, batch; blocks are 32 tokens at D = 128, 64 at 64, 128 at 32
CASES = [
    ((1,), 2, 1, 32, 1),
    ((2, 17), 3, 4, 64, 2),
    ((33,), 3, 6, 128, 1),
    ((64,), 2, 2, 128, 2),  # whole blocks only
    ((100, 130), 3, 3, 32, 1),
]


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def inputs(case, dtype, seed=0):
    """Leaves: streams as the first columns of a wider tensor full of NaN elsewhere, and scales."""
    lengths, P, H, D, B = case
    generator = torch.Generator().manual_seed(seed)
    streams, width = [], P * H * D
    for n in lengths:
        wide = torch.full((B, n + 2, width + 32), torch.nan, dtype=dtype)
        x = wide[:, 1:-1, 16 : 16 + width].unflatten(-1, (P, H, D))
        x.copy_(torch.randn(B, n, P, H, D, generator=generator) * torch.logspace(-2, 1, H)[:, None])
        streams.append(x.detach().requires_grad_())
    scales = [(torch.rand(D, generator=generator) * 2 - 0.5).requires_grad_() for _ in range(2 * len(lengths))]
    angle = torch.rand(sum(lengths), D // 2, generator=generator) * 7
    pe = torch.stack((angle.cos(), angle.sin()), dim=-1)
    return streams, scales, pe, torch.randn(B, sum(lengths), P, H, D, generator=generator).to(dtype)


def float64(streams, scales, pe):
    """Rotation matrices of FLUX, written out: independent of the code under test."""
    (cos, sin), out, start = pe.double().unbind(-1), [], 0
    matrices = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))  # (N, D / 2, 2, 2)
    for i, x in enumerate(streams):
        rows = matrices[start : start + x.shape[1], None]
        start += x.shape[1]
        parts = []
        for part, scale in enumerate(scales[2 * i : 2 * i + 2]):
            y = x[:, :, part].double()
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale.double()
            parts.append((rows @ y.unflatten(-1, (-1, 2, 1))).flatten(-3))
        out.append(torch.stack((*parts, *x[:, :, 2:].double().unbind(2)), dim=2))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("function", [qk_norm_rope_triton, qk_norm_rope_reference], ids=["triton", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(function, dtype, case):
    streams, scales, pe, dout = inputs(case, dtype)
    expected = float64(streams, scales, pe)
    expected_grads = torch.autograd.grad(expected, streams + scales, dout.double())
    out = function(streams, scales, pe)
    assert out.dtype == dtype and out.is_contiguous()
    grads = torch.autograd.grad(out, streams + scales, dout)
    errors = [relative(a, b) for a, b in zip((out, *grads), (expected, *expected_grads))]
    print("errors: " + " ".join(f"{e:.1e}" for e in errors))  # shown by pytest -s
    assert max(errors) <= TOLERANCE[dtype]
    per_head = (out.double() - expected).abs().amax((0, 1, 2, 4)) / expected.abs().amax((0, 1, 2, 4))
    assert per_head.max() <= TOLERANCE[dtype]  # no head hides behind a larger one
    assert torch.equal(out[:, :, 2:], torch.cat([x[:, :, 2:] for x in streams], dim=1))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e4])
def test_extreme_sizes(size):
    """eps decides below 1e-3, and squares of large fp16 values leave fp16's range."""
    streams, scales, pe, dout = inputs(((33,), 2, 2, 32, 1), torch.float16)
    streams = [(x.detach() / x.detach().abs().amax() * size).requires_grad_() for x in streams]
    expected = float64(streams, scales, pe)
    for function in (qk_norm_rope_triton, qk_norm_rope_reference):
        out = function(streams, scales, pe)
        torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=6e-4 * expected.abs().max().item())
        assert all(g.isfinite().all() for g in torch.autograd.grad(out, streams + scales, dout))


def test_nothing_is_written_outside(monkeypatch):
    """Every buffer the launchers allocate lies between guard bands."""
    bands = []

    def guarded(size):
        buffer = torch.full((size.numel() + 2048,), 77.0)
        if size.numel():  # the interpreter makes empty ones
            bands.append(buffer)
        return buffer[1024:-1024].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kw: guarded(torch.Size(size)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: guarded(x.shape))
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: guarded(torch.Size(size)))
    streams, scales, pe, dout = inputs(((2, 37), 3, 3, 32, 1), torch.float32)
    torch.autograd.grad(qk_norm_rope_triton(streams, scales, pe), streams + scales, dout)
    monkeypatch.undo()
    assert len(bands) == 5  # the joint buffer; a gradient and partial sums per stream
    for buffer in bands:
        assert (buffer[:1024] == 77).all() and (buffer[-1024:] == 77).all()
    assert (bands[0][1024:-1024] != 77).all()


def test_reference_has_the_same_bits_without_autograd():
    for case in CASES:
        streams, scales, pe, _ = inputs(case, torch.float32)
        with torch.no_grad():
            plain = qk_norm_rope_reference(streams, scales, pe)
        assert torch.equal(plain, qk_norm_rope_reference(streams, scales, pe))


def test_opcheck_and_gradcheck():
    streams, scales, pe, _ = inputs(((2, 5), 3, 2, 32, 1), torch.float32)
    torch.library.opcheck(qk_norm_rope_triton, (streams, scales, pe))
    x, w = streams[0].detach()[:, :, :, :1].clone().requires_grad_(), scales[:2]
    run = lambda x, q, k: qk_norm_rope_triton([x], [q, k], pe[:2])  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *w), eps=1e-2, atol=2e-2, rtol=2e-2, fast_mode=True)


def test_meta_tensors_and_compile():
    streams, scales, pe, _ = inputs(((2, 5), 3, 2, 32, 1), torch.float32)
    meta = lambda tensors: [t.detach().to("meta") for t in tensors]  # noqa: E731
    assert qk_norm_rope_triton(meta(streams), meta(scales), pe.to("meta")).shape == (1, 7, 3, 2, 32)
    torch._dynamo.reset()
    for function in (qk_norm_rope_triton, qk_norm_rope_reference):  # the reference turns to pairs of real numbers here
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert relative(compiled(streams, scales, pe), float64(streams, scales, pe)) <= 2e-6


def test_refusals():
    streams, scales, pe, _ = inputs(((2,), 3, 2, 32, 1), torch.float32)
    with pytest.raises(AssertionError, match="packed"):
        qk_norm_rope_triton([streams[0].transpose(2, 3).contiguous().transpose(2, 3)], scales, pe)
    with pytest.raises(AssertionError, match="16 bytes"):
        qk_norm_rope_triton([F.pad(streams[0].detach().flatten(2), (1, 0))[..., 1:].unflatten(2, (3, 2, 32))], scales, pe)
    with pytest.raises(AssertionError, match="scale each"):
        qk_norm_rope_triton(streams, scales[:1], pe)
