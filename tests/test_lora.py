"""LoRA: exact at the start, exact when merged, and files that other programs read. python -m pytest tests/test_lora.py"""

import copy
import inspect
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from model import lora
from model.mmdit import MMDiT, MMDiTConfig, position_ids, rope_table
from model.weights import FLUX_DIFFUSERS, translate

TINY = MMDiTConfig(in_channels=16, vec_in_dim=24, context_in_dim=48, hidden_size=64, num_heads=2, depth=2,
                   depth_single_blocks=3, axes_dim=(4, 14, 14))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MMDiT(TINY)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float(name.endswith("scale")), std=0.08)
    return model


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    txt, target, reference, pooled = (torch.randn(2, *shape, generator=g, dtype=torch.float64).to(dtype)
                                      for shape in ((7, 48), (12, 16), (10, 16), (24,)))
    ids = torch.cat([torch.zeros(7, 3)] + [position_ids(i, torch.arange(r), torch.arange(c))
                                           for i, r, c in ((0, 4, 3), (1, 2, 5))])
    return txt, target, reference, pooled, ids, torch.tensor([0.73, 0.21]), torch.tensor([2.5, 2.5])


def run(model):
    txt, target, reference, pooled, ids, t, guidance = inputs(model.img_in.weight.dtype)
    with torch.no_grad():
        mods = model.modulations(t, guidance, pooled)
        return model(txt, target, reference, None, rope_table(ids, TINY.axes_dim, TINY.theta), mods)[0]


def randomise(model):
    g = torch.Generator().manual_seed(2)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.05, generator=g)


def test_equals_base_until_trained(model):
    before = run(model)
    lora.inject(model, rank=4, alpha=8)
    assert torch.equal(run(model), before)
    learns = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match="already carries"):
        lora.inject(model, rank=4, alpha=8)


def test_merge_equals_wrapped_in_double(model):
    model.double()
    before, names = run(model), set(model.state_dict())
    lora.inject(model, rank=4, alpha=8)
    randomise(model)
    wrapped = run(model)
    lora.merge(model)
    assert set(model.state_dict()) == names
    assert (wrapped - before).norm() > 1e-2 * before.norm()
    assert (run(model) - wrapped).norm() <= 1e-6 * wrapped.norm()


def test_merge_into_bf16_rounds_once(model):
    model.bfloat16()
    W = model.single_blocks[1].linear1.weight.double()
    lora.inject(model, rank=4, alpha=2)
    randomise(model)
    layer = model.single_blocks[1].linear1
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    exact = W + 0.5 * layer.lora_B.double() @ layer.lora_A.double()
    lora.merge(model)
    got = model.single_blocks[1].linear1.weight
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # half a unit in the last of 8 bits


def test_modulation_is_untouched(model):
    lora.inject(model, rank=4, alpha=4)
    assert isinstance(model.double_blocks[0].img_mod.lin, torch.nn.Linear)
    assert isinstance(model.double_blocks[1].txt_mod.lin, torch.nn.Linear)
    assert isinstance(model.single_blocks[2].modulation.lin, torch.nn.Linear)
    assert isinstance(model.final_layer.linear, torch.nn.Linear)
    assert len(lora.lora_layers(model)) == 2 * 8 + 3 * 2


def test_file_round_trip_is_bit_equal(model, tmp_path):
    lora.inject(model, rank=4, alpha=4)
    randomise(model)
    output = run(model)
    weights = {n: (layer.lora_A.clone(), layer.lora_B.clone()) for n, layer in lora.lora_layers(model).items()}
    lora.save(model, tmp_path / "lora.safetensors", {"stage": "2"})
    for layer in lora.lora_layers(model).values():
        layer.lora_B.data.zero_()
    metadata = lora.load(model, tmp_path / "lora.safetensors")
    assert metadata == {"stage": "2", "format": "pt"}
    for name, layer in lora.lora_layers(model).items():
        assert torch.equal(layer.lora_A, weights[name][0]) and torch.equal(layer.lora_B, weights[name][1])
    assert torch.equal(run(model), output)


def test_file_follows_the_diffusers_layout(model, tmp_path):
    lora.inject(model, rank=4, alpha=12)
    randomise(model)
    lora.save(model, tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    state = load_file(tmp_path / "lora.safetensors")
    assert len(state) == 2 * (2 * 12 + 3 * 5)
    qkv, linear1 = model.double_blocks[1].txt_attn.qkv, model.single_blocks[2].linear1
    for part, rows, layer in (
        ("transformer_blocks.1.attn.add_q_proj", slice(0, 64), qkv),
        ("transformer_blocks.1.attn.add_k_proj", slice(64, 128), qkv),
        ("transformer_blocks.1.attn.add_v_proj", slice(128, 192), qkv),
        ("transformer_blocks.0.attn.to_out.0", slice(None), model.double_blocks[0].img_attn.proj),
        ("transformer_blocks.0.attn.to_add_out", slice(None), model.double_blocks[0].txt_attn.proj),
        ("transformer_blocks.0.ff.net.0.proj", slice(None), model.double_blocks[0].img_mlp[0]),
        ("transformer_blocks.0.ff_context.net.2", slice(None), model.double_blocks[0].txt_mlp[2]),
        ("single_transformer_blocks.2.attn.to_v", slice(128, 192), linear1),
        ("single_transformer_blocks.2.proj_mlp", slice(192, 448), linear1),
        ("single_transformer_blocks.2.proj_out", slice(None), model.single_blocks[2].linear2),
    ):
        assert torch.equal(state[f"transformer.{part}.lora_A.weight"], layer.lora_A)
        assert torch.equal(state[f"transformer.{part}.lora_B.weight"], layer.lora_B[rows] * 3)  # alpha / rank


def test_parts_trained_apart_fuse_exactly(model, tmp_path):
    """q, k with their own A and rank, v absent: the delta of each part must come out, and v must stay."""
    g = torch.Generator().manual_seed(3)
    q, k = ((torch.randn(r, 64, generator=g), torch.randn(64, r, generator=g)) for r in (2, 5))
    name = "transformer.transformer_blocks.0.attn.to_"
    save_file({f"{name}{part}.lora_{X}.weight": tensor for part, factors in (("q", q), ("k", k))
               for X, tensor in zip("AB", factors)}, tmp_path / "apart.safetensors")
    W = model.double_blocks[0].img_attn.qkv.weight.detach().clone()
    other = model.single_blocks[0].linear1
    lora.load(model, tmp_path / "apart.safetensors")
    assert model.single_blocks[0].linear1 is other
    lora.merge(model)
    delta = model.double_blocks[0].img_attn.qkv.weight - W
    expected = torch.cat([q[1] @ q[0], k[1] @ k[0], torch.zeros(64, 64)])
    torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-5)


def test_wrong_files_are_refused_in_a_sentence(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        lora.load(model, tmp_path / "absent.safetensors")
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({key.format("A"): torch.zeros(4, 32), key.format("B"): torch.zeros(64, 4)}, tmp_path / "size.safetensors")
    with pytest.raises(ValueError, match="made for another model"):
        lora.load(model, tmp_path / "size.safetensors")
    save_file({key.format("A"): torch.zeros(4, 64)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="only one of lora_A and lora_B"):
        lora.load(model, tmp_path / "half.safetensors")
    nan = torch.full((64, 4), torch.nan)
    save_file({key.format("A"): torch.zeros(4, 64), key.format("B"): nan}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        lora.load(model, tmp_path / "nan.safetensors")
    assert not lora.lora_layers(model)


def test_kontext_counts():
    """228 fused modules, 3,502,080 parameters per rank: computed from the official checkpoint's shapes."""
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig())
    lora.inject(model, rank=2, alpha=2)
    layers = lora.lora_layers(model)
    assert len(layers) == 228
    assert sum(p.numel() for layer in layers.values() for p in (layer.lora_A, layer.lora_B)) == 2 * 3_502_080


# ---- against diffusers ----------------------------------------------------------------------------------------------


def peer(model):
    """diffusers' pipeline around its own transformer with this model's weights."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 14, 14))
    state = {}
    for name, tensor in model.state_dict().items():
        if "adaLN" in name:
            tensor = torch.cat(tensor.chunk(2)[::-1])  # shift, scale -> scale, shift
        parts = translate(name, FLUX_DIFFUSERS)
        rows = [64] * (len(parts) - 1)
        state |= dict(zip(parts, tensor.split(rows + [len(tensor) - sum(rows)])))
    transformer.load_state_dict(state)
    absent = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxKontextPipeline(transformer=transformer, **absent)


def run_peer(pipe):
    txt, target, reference, pooled, ids, t, guidance = inputs()
    with torch.no_grad():
        velocity = pipe.transformer(
            hidden_states=torch.cat((target, reference), 1), encoder_hidden_states=txt, pooled_projections=pooled,
            timestep=t, guidance=guidance, txt_ids=ids[:7], img_ids=ids[7:], return_dict=False)[0]
    return velocity[:, : target.shape[1]]


def difference(a, b):
    found = (a - b).abs().max().item()
    print(f"largest difference {found:.1e}")  # shown by pytest -s
    return found


def loaded_keys(pipe):
    from peft import get_peft_model_state_dict

    return {f"transformer.{key}" for key in get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")}


def merged(model, path):
    """A copy with the file's LoRA merged; also checks that it runs the same while still apart."""
    model = copy.deepcopy(model)
    lora.load(model, path)
    apart = run(model)
    lora.merge(model)
    assert difference(run(model), apart) <= 1e-5
    return model


def random_factors(model, names, seed=5):
    """BFL module -> A, B, alpha: ranks 3 to 6, a different alpha each."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for i, name in enumerate(names):
        layer, rank = model.get_submodule(name), 3 + i % 4
        A, B = torch.randn(rank, layer.in_features, generator=g), torch.randn(layer.out_features, rank, generator=g)
        factors[name] = (0.2 * A, 0.1 * B, 1.5 + 0.25 * (i % 7))
    return factors


def merged_by_hand(model, factors):
    """W + alpha / rank * B A in float64; alpha None counts as the rank."""
    model = copy.deepcopy(model)
    for name, (A, B, alpha) in factors.items():
        W = model.get_submodule(name).weight.data
        W.copy_(W.double() + (1 if alpha is None else alpha / len(A)) * B.double() @ A.double())
    return model


def write(path, factors, rename, pair):
    state = {}
    for name, (A, B, alpha) in factors.items():
        state[f"{rename(name)}.{pair[0]}.weight"], state[f"{rename(name)}.{pair[1]}.weight"] = A, B
        if alpha is not None:
            state[f"{rename(name)}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return path


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


def dotted(name):
    return "diffusion_model." + name


def every_linear(model, blocks=True, rest=True):
    return [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)
            and (blocks if name.startswith(("double_blocks", "single_blocks")) else rest)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_loads_what_we_save(model, tmp_path, dtype):
    pipe, base, before = peer(model), copy.deepcopy(model), run(model)
    assert difference(run_peer(pipe), before) <= 1e-5
    lora.inject(model, rank=4, alpha=12)
    randomise(model)
    lora.save(model, tmp_path / "lora.safetensors", {"stage": "2", "preset": "tiny"}, dtype)
    lora.merge(model)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {dtype} and loaded_keys(pipe) == set(state)
    assert difference(run(model), before) > 0.1
    assert difference(run_peer(pipe), run(merged(base, tmp_path / "lora.safetensors"))) <= 1e-5
    if dtype == torch.float32:  # bf16 rounds A and B
        assert difference(run_peer(pipe), run(model)) <= 1e-5


def test_diffusers_loads_a_foreign_lora_that_we_save_again(model, tmp_path):
    """Every linear layer, so that the final layer's halves change places on the way out."""
    pipe, factors = peer(model), random_factors(model, every_linear(model))
    lora.load(model, write(tmp_path / "kohya.safetensors", factors, kohya, ("lora_down", "lora_up")))
    assert len(lora.lora_layers(model)) == len(factors) == 2 * 10 + 3 * 3 + 10
    lora.save(model, tmp_path / "ours.safetensors")
    pipe.load_lora_weights(tmp_path / "ours.safetensors")
    assert loaded_keys(pipe) == set(load_file(tmp_path / "ours.safetensors"))
    lora.merge(model)
    assert difference(run_peer(pipe), run(model)) <= 1e-5


# ---- foreign files --------------------------------------------------------------------------------------------------


def test_peft_with_alpha_tensors(model, tmp_path):
    """Each part of a fused module has its own A and alpha, some their own rank. The modules outside the blocks share one
    alpha: diffusers takes the final proj_out's own alpha for every block's proj_out."""
    pipe, before = peer(model), run(model)
    g, state = torch.Generator().manual_seed(6), {}
    for i, (name, layer) in enumerate((n, m) for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)):
        rank, key = 2 + i // 5 % 3, f"transformer.{name}"
        state[f"{key}.lora_A.weight"] = 0.2 * torch.randn(rank, layer.in_features, generator=g)
        state[f"{key}.lora_B.weight"] = 0.1 * torch.randn(layer.out_features, rank, generator=g)
        state[f"{key}.alpha"] = torch.tensor(1.5 + i % 4 if "blocks" in name else 3.0)
    save_file(state, tmp_path / "peft.safetensors")
    pipe.load_lora_weights(tmp_path / "peft.safetensors")
    ours = run(merged(model, tmp_path / "peft.safetensors"))
    assert difference(ours, before) > 0.1
    assert difference(run_peer(pipe), ours) <= 1e-5

    integers = {key: tensor.int() if key.endswith("alpha") else tensor for key, tensor in state.items()}
    save_file(integers, tmp_path / "int.safetensors")  # diffusers refuses it; it says the same thing as floats do
    save_file({key: tensor.float() for key, tensor in integers.items()}, tmp_path / "float.safetensors")
    assert torch.equal(run(merged(model, tmp_path / "int.safetensors")), run(merged(model, tmp_path / "float.safetensors")))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_with_metadata(model, tmp_path, rslora):
    """Written by peft and diffusers themselves, with a rank and an alpha of their own for some modules."""
    pipe, before = peer(model), run(model)
    from peft import LoraConfig, get_peft_model_state_dict

    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_mlp", "norm_out.linear", "x_embedder"]
    pipe.transformer.add_adapter(LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, rank_pattern={"to_k": 3, "proj_mlp": 5},
        alpha_pattern={"to_k": 7, r"^transformer_blocks\.1\.attn\.to_q": 2}, use_rslora=rslora))
    torch.manual_seed(7)
    for name, p in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    type(pipe).save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict())
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        assert "alpha_pattern" in file.metadata()["lora_adapter_metadata"]
    ours = run(merged(model, path))
    assert difference(ours, before) > 0.1
    assert difference(run_peer(pipe), ours) <= 1e-5
    again = peer(model)
    again.load_lora_weights(path)
    assert difference(run_peer(again), ours) <= 1e-5


@pytest.mark.parametrize("rename", [kohya, dotted])
def test_bfl_names_with_lora_down_and_up(model, tmp_path, monkeypatch, rename):
    """The blocks' modules, which diffusers reads; it drops the others without a word."""
    pipe, before = peer(model), run(model)
    from diffusers.loaders import lora_conversion_utils, lora_pipeline

    converter = "_convert_kohya_flux_lora_to_diffusers"
    source = inspect.getsource(getattr(lora_conversion_utils, converter))
    official, scope = "dims=[3072, 3072, 3072, 12288]", dict(vars(lora_conversion_utils))
    assert official in source  # the width is written into diffusers' code: this is that code with the tiny width
    exec(source.replace(official, "dims=[64, 64, 64, 256]"), scope)
    monkeypatch.setattr(lora_pipeline, converter, scope[converter])

    factors = random_factors(model, every_linear(model, rest=False))
    path = write(tmp_path / "lora.safetensors", factors, rename, ("lora_down", "lora_up"))
    pipe.load_lora_weights(path)
    ours = run(merged(model, path))
    assert difference(ours, before) > 0.1
    assert difference(run_peer(pipe), ours) <= 1e-5
    assert difference(run(merged_by_hand(model, factors)), ours) <= 1e-5


@pytest.mark.parametrize("rename, pair", [(kohya, ("lora_down", "lora_up")), (dotted, ("lora_A", "lora_B"))])
@pytest.mark.parametrize("blocks", [True, False])
def test_bfl_names_that_diffusers_drops(model, tmp_path, rename, pair, blocks):
    """Also embedders and final layer, and without alpha here and there: against weights merged by hand in float64."""
    factors = random_factors(model, every_linear(model, blocks))
    factors = {name: (A, B, None if i % 5 == 0 else alpha) for i, (name, (A, B, alpha)) in enumerate(factors.items())}
    ours = merged(model, write(tmp_path / "lora.safetensors", factors, rename, pair))
    truth = merged_by_hand(model, factors)
    for name, W in truth.state_dict().items():
        assert difference(ours.state_dict()[name], W) <= 1e-6, name
    assert difference(run(truth), run(model)) > 0.1
    assert difference(run(ours), run(truth)) <= 1e-5


A, B = torch.ones(2, 64), torch.ones(64, 2)  # fit every projection of the model's width
Q, PROJ = "transformer.transformer_blocks.0.attn.to_q", "lora_unet_double_blocks_0_img_attn_proj"
ONE = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
KOHYA = {f"{PROJ}.lora_down.weight": A, f"{PROJ}.lora_up.weight": B}


@pytest.mark.parametrize("state, what", [
    ({"lora_transformer_proj_out.lora_down.weight": A}, "OneTrainer"),
    ({"lycoris_proj_out.lora_down.weight": A}, "LyCORIS"),
    ({"base_model.model.double_blocks.0.img_attn.proj.lora_A.weight": A}, "fal file"),
    ({"double_blocks.0.img_attn.proj.lora_A.weight": A}, "bare names"),
    ({"transformer_blocks.0.attn.to_q.lora_A.weight": A}, "bare names"),
    ({"img_in.lora_A.weight": A, "single_blocks.0.norm.key_norm.scale": A}, "replaces norm scales"),
    (ONE | {"transformer.transformer_blocks.0.attn.norm_added_q.weight": A}, "replaces norm scales"),
    ({"img_in.lora_A.weight": A, "img_in.lora_B.bias": A}, "biases"),
    (ONE | {f"{Q}.dora_scale": A}, "DoRA"),
    ({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": A}, "LoKr"),
    ({f"{PROJ}.hada_w1_a": A}, "LoHa"),
    (KOHYA | {f"{PROJ}.lora_mid.weight": A}, "middle factor"),
    (KOHYA | {f"{PROJ}.diff_b": A}, "whole differences"),
    ({"diffusion_model.double_blocks.0.img_attn.proj.diff": A}, "whole differences"),
    ({f"{Q}.lora_down.weight": A}, "programs disagree"),
])
def test_other_kinds_are_refused_by_name(model, tmp_path, state, what):
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"{what}.*to one of: kohya|{what}.*Expected one of: kohya"):
        lora.load(model, tmp_path / "lora.safetensors")
    assert not lora.lora_layers(model)


def save_with(path, state, header=None):
    save_file({key: tensor.clone() for key, tensor in state.items()}, path, header)
    return path


def test_unused_keys_are_reported(model, tmp_path):
    path = tmp_path / "lora.safetensors"
    unknown = {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": A, "transformer.time.alpha": torch.ones(())}
    with pytest.warns(UserWarning, match=r"2 of 4 keys belong to no layer.*time.alpha, .*blocks.7.attn.to_q.lora_A.weight"):
        lora.load(model, save_with(path, ONE | unknown))
    assert set(lora.lora_layers(model)) == {"double_blocks.0.img_attn.qkv"}

    mixed = KOHYA | ONE | {"lora_transformer_proj_out.lora_down.weight": A}  # the first layout of the order counts
    with pytest.warns(UserWarning, match="3 of 5 keys belong to no layer"):
        lora.load(model, save_with(path, mixed))
    assert set(lora.lora_layers(model)) == {"double_blocks.0.img_attn.proj"}  # in place of the first

    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A, "text_encoder.layers.0.lora_A.weight": A,
            "text_encoders.t5xxl.transformer.encoder.dora_scale": A}
    with pytest.warns(UserWarning, match="3 keys adapt text encoders") as caught:
        lora.load(model, save_with(path, KOHYA | text))
    assert len(caught) == 1

    for state, sentence in ((unknown, "none of its 2 keys"), (text, "no LoRA tensors for the transformer"),
                            ({"lora_unet_down_blocks_0.lora_down.weight": A}, "none of its 1 keys")):
        with pytest.raises(ValueError, match=sentence):
            lora.load(model, save_with(path, state))
    assert set(lora.lora_layers(model)) == {"double_blocks.0.img_attn.proj"}  # as it was


def test_alpha_is_one_finite_number_said_once(model, tmp_path):
    path, alpha = tmp_path / "lora.safetensors", f"{Q}.alpha"
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})}
    with pytest.raises(ValueError, match="alpha twice"):
        lora.load(model, save_with(path, ONE | {alpha: torch.tensor(4.0)}, header))
    for wrong in (torch.ones(2), torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match="must be one finite number"):
            lora.load(model, save_with(path, ONE | {alpha: wrong}))
    with pytest.raises(ValueError, match="not a JSON object"):
        lora.load(model, save_with(path, ONE, {"lora_adapter_metadata": "[]"}))
    with pytest.raises(ValueError, match="DoRA"):
        lora.load(model, save_with(path, ONE, {"lora_adapter_metadata": '{"transformer.use_dora": true}'}))

    save_with(path, ONE | {alpha: torch.tensor(4.0)}, header)
    with pytest.raises(ValueError, match="Both `network_alphas` and `metadata`"):
        peer(model).load_lora_weights(path)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_the_low_rank_layer(bias):
    """Against finite differences in fp64, with a scale that is not 1, inside and outside autocast."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(6, 5, bias=bias).double(), rank=3, alpha=2.0).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    W = layer.base.weight + 2 / 3 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ W.mT + (layer.base.bias if bias else 0))
    assert torch.autograd.gradcheck(lambda x, A, B: torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, x),
                                    (x, layer.lora_A, layer.lora_B))
    layer, x = layer.float(), x.detach().float()  # the first layer's input needs no gradient
    exact = torch.autograd.grad(layer(x).square().sum(), (layer.lora_A, layer.lora_B))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    for a, b in zip(torch.autograd.grad(y.float().square().sum(), (layer.lora_A, layer.lora_B)), exact):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.03 * b.abs().max()
