"""The method: conditioning, losses, sampler, modulation table.     python -m pytest tests/test_spatialdiff.py"""

import math
from dataclasses import replace

import pytest
import torch

from model.mmdit import MMDiT, position_ids, rope_table, timestep_embedding
from spatialdiff import (
    PRESETS, Condition, SpatialDiff, build, decode_depth, depth_target, losses, make_noise, sample, sample_times, schedule, shift_mu,
)

TINY = PRESETS["tiny"]
KONTEXT = PRESETS["kontext"]
GRID = (3, 5)  # not square


def randomize(module, seed=0, std=0.15):
    """Every parameter at random, norm scales included: fresh initialisations hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (1.0 if p.ndim == 1 else 0.0))
    return module.eval()


@pytest.fixture
def model():
    return randomize(SpatialDiff(TINY)).double()


def condition(batch=2, geometry=True, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=dtype)
    n = GRID[0] * GRID[1]
    c = TINY.mmdit
    s = draw(batch, 9, TINY.connector.in_dim) if geometry else None
    return Condition(draw(batch, 7, c.context_in_dim), draw(batch, c.vec_in_dim), draw(batch, n, c.in_channels), s, GRID)


def plain_sampler(model, cond, noise, steps, guidance):
    """The Euler sampler as the formula says it, everything computed anew in every step."""
    times, x = schedule(TINY, steps, noise.shape[1]), noise.float()
    with torch.no_grad():
        for i in range(steps):
            t = times[i] * torch.ones(len(x))
            v, _ = model(x, t, guidance * torch.ones(len(x)), cond)
            x = x + (times[i + 1] - times[i]) * v.float()
    return x


@pytest.mark.parametrize("geometry", [True, False])
def test_modulation_table_is_exact_and_frees_its_layers(geometry):
    model = randomize(SpatialDiff(TINY))
    cond, noise = condition(geometry=geometry, dtype=torch.float32), make_noise(TINY, GRID, [3, 4])
    plain = plain_sampler(model, cond, noise, 5, 2.5)
    before = sum(p.numel() for p in model.mmdit.parameters())
    table, _ = sample(model, cond, noise, 5, 2.5, drop=True)
    assert torch.equal(table, plain)
    c = TINY.mmdit
    d = c.hidden_size
    freed = c.depth * 2 * 6 * (d * d + d) + c.depth_single_blocks * 3 * (d * d + d) + 2 * (d * d + d)
    freed += 2 * (256 * d + d + d * d + d) + (c.vec_in_dim * d + d + d * d + d)
    assert before - sum(p.numel() for p in model.mmdit.parameters()) == freed


def test_kontext_frees_a_quarter_of_its_parameters():
    with torch.device("meta"):
        mmdit = MMDiT(KONTEXT.mmdit)
    assert sum(p.numel() for p in mmdit.parameters()) == 11_901_408_320
    embedders = 2 * 10_229_760 + 11_802_624  # time_in, guidance_in, vector_in
    assert mmdit.drop_modulation_layers() == 3_247_448_064 + embedders
    assert not [n for n, _ in mmdit.named_parameters() if "mod" in n]


def test_every_kontext_part_builds_on_meta():
    for part in ("vae", "t5", "clip", "vggt", "mmdit", "connector", "spatial_head"):
        assert all(p.is_meta for p in build(KONTEXT, part, "meta").parameters())
    connector = build(KONTEXT, "connector", "meta")
    assert connector.query.shape == (1024, 3072) and len(connector.blocks) == 8


def test_sequence_order_and_position_ids(model):
    """Ids are (0,0,0) text, (0,r,c) target, (1,r,c) reference, (2, stretched) spatial; text comes first."""
    cond, g = condition(), model.connector.grid
    pe = model.rope(cond)
    h, w = GRID
    expected = [(0.0, 0.0, 0.0)] * 7
    expected += [(i, r, c) for i in (0, 1) for r in range(h) for c in range(w)]
    expected += [(2, r * (h - 1) / (g - 1), c * (w - 1) / (g - 1)) for r in range(g) for c in range(g)]
    axes = TINY.mmdit.axes_dim
    for row, ids in zip(pe.double(), expected, strict=True):
        angle = [i * 10_000 ** (-2 * j / d) for i, d in zip(ids, axes) for j in range(d // 2)]
        assert torch.allclose(row[:, 0], torch.tensor(angle).double().cos(), atol=1e-6)
        assert torch.allclose(row[:, 1], torch.tensor(angle).double().sin(), atol=1e-6)


def test_rows_and_columns_are_not_swapped():
    table = rope_table(position_ids(0, torch.arange(3), torch.arange(5)), (4, 8, 12), 10_000)
    assert torch.equal(table[0, 2:6], table[4, 2:6])  # same row
    assert not torch.equal(table[0, 6:], table[4, 6:])  # other column


def test_attention_sees_every_stream(model):
    """The velocity depends on text, reference and geometry, and reference tokens may be permuted with their ids."""
    cond = condition(batch=1)
    x, t = torch.randn(1, 15, 16, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    v, spatial = model(x, t, torch.ones(1), cond)
    assert v.shape == (1, 15, 16) and spatial.shape == (1, 9, 48)
    for field in ("txt", "pooled", "reference", "geometry"):
        changed = replace(cond, **{field: getattr(cond, field).flip(-1)})
        assert (model(x, t, torch.ones(1), changed)[0] - v).abs().max() > 1e-4, field
    # the same sequence by hand, reference tokens in another order together with their rotations
    order = torch.randperm(15)
    pe = model.rope(cond)
    moved = torch.cat((pe[:22], pe[22:37][order], pe[37:]))
    mods = model.mmdit.modulations(t, torch.ones(1), cond.pooled)
    again, _ = model.mmdit(cond.txt, x, cond.reference[:, order], model.spatial_tokens(cond), moved, mods)
    assert (again - v).abs().max() < 1e-5 * v.abs().max()


def test_timestep_embedding_formula():
    t = torch.tensor([0.73, 2.5])
    w = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    angle = 1000 * t.double()[:, None] * w
    expected = torch.cat((angle.cos(), angle.sin()), 1)
    assert (timestep_embedding(t) - expected).abs().max() < 2e-4  # fp32 angles up to 2500


def test_schedule_and_shift():
    """sigma = e^mu / (e^mu + 1/u - 1), mu linear in target tokens: 0.63 at 1024, 1.15 at 4096."""
    assert shift_mu(KONTEXT, 4096) == pytest.approx(1.15) and shift_mu(KONTEXT, 1024) == pytest.approx(0.63)
    times = schedule(KONTEXT, 7, 1024)
    for i, time in enumerate(times.tolist()):
        u = 1 - i / 7
        assert time == pytest.approx(math.exp(0.63) / (math.exp(0.63) + 1 / u - 1) if u > 1e-9 else 0.0, abs=1e-6)


def test_training_times_follow_the_preset():
    t = sample_times(KONTEXT, 200_000, 1024, torch.Generator().manual_seed(0))
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(0.63, abs=0.01) and logit.std().item() == pytest.approx(1.0, abs=0.01)
    nano = PRESETS["nano"]
    t = sample_times(nano, 200_000, 64, torch.Generator().manual_seed(0))
    alone = sample_times(replace(nano, t_tail=0.0), 200_000, 64, torch.Generator().manual_seed(0))
    share = lambda x: (x > 0.95).double().mean().item()
    assert share(t) == pytest.approx(nano.t_tail + (1 - nano.t_tail) * share(alone), abs=0.005)


def test_losses_are_the_papers(model):
    cond = condition(batch=3)
    g = torch.Generator().manual_seed(5)
    target, noise = (torch.randn(3, 15, 16, generator=g) for _ in "ab")
    t, depth = torch.tensor([0.2, 0.7, 0.99]), torch.randn(3, 9, 16, generator=g)
    model = model.float()
    cond = Condition(cond.txt.float(), cond.pooled.float(), cond.reference.float(), cond.geometry.float(), GRID)
    flow, gss = losses(model, cond, target, noise, t, depth)
    for b in range(3):
        one = Condition(cond.txt[b : b + 1], cond.pooled[b : b + 1], cond.reference[b : b + 1], cond.geometry[b : b + 1], GRID)
        x_t = (1 - t[b]) * target[b : b + 1] + t[b] * noise[b : b + 1]
        v, s = model(x_t, t[b : b + 1], torch.ones(1), one)
        assert flow[b].item() == pytest.approx(((noise[b] - target[b] - v[0]) ** 2).mean().item(), rel=1e-4)
    assert gss.item() > 0
    gss.backward()
    assert model.connector.query.grad.abs().max() > 0 and model.mmdit.final_layer.linear.weight.grad is None


def test_depth_targets():
    vae = randomize(build(TINY, "vae"), std=0.05)
    maps = torch.rand(2, 40, 56) * 2 - 1
    eds = depth_target(vae, maps, 3, "eds")
    square = torch.nn.functional.interpolate(maps[:, None], (48, 48), mode="bilinear", align_corners=True)[:, 0]
    assert torch.equal(eds[1, 5], square[1, 16:32, 32:48].flatten())  # token (1, 2)
    grey = decode_depth(vae, eds, 3)
    assert torch.equal(grey[..., 0], (square * 127.5 + 127.5).round().to(torch.uint8)) and grey.shape == (2, 48, 48, 3)
    lds = depth_target(vae, maps, 3, "lds")
    assert lds.shape == (2, 9, 16)
    one = vae.encode(square[:1, None].expand(-1, 3, -1, -1))
    assert torch.allclose(lds[0, 5].reshape(4, 2, 2), one[0, :, 2:4, 4:6], atol=1e-5)


def test_noise_does_not_depend_on_the_batch():
    assert torch.equal(make_noise(TINY, GRID, [1, 2, 3])[1:2], make_noise(TINY, GRID, [2]))
    assert make_noise(KONTEXT, (2, 3), [0]).shape == (1, 6, 64)


def test_bf16_explicit_attention_agrees_with_fused():
    """On a CPU, bf16 training takes the explicit formulation, sampling the fused one: the same function."""
    model = randomize(SpatialDiff(TINY), std=0.1)
    cond, x = condition(dtype=torch.float32), torch.randn(2, 15, 16)
    t = torch.tensor([0.3, 0.8])
    with torch.autocast("cpu", torch.bfloat16):
        explicit = model(x, t, torch.ones(2), cond)[0].detach()
        with torch.no_grad():
            fused = model(x, t, torch.ones(2), cond)[0]
    exact = model(x, t, torch.ones(2), cond)[0].detach()
    assert (explicit - fused).norm() / fused.norm() < 0.02
    assert (explicit - exact).norm() / exact.norm() < 0.05
