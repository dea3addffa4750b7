"""Text encoders against formulas written here in float64; tokenization against stored ids and transformers.

    SPATIALDIFF_TOKENIZERS=folder pytest tests/test_text.py

The official tokenizer files (t5/tokenizer.json, clip/vocab.json, clip/merges.txt) are looked for in that folder, then in
weights/; tests that need them are skipped without. tests/data/golden_ids.json: ids of 12 prompts, equal in transformers
4.51.3 and 5.23.0.
"""

import json
import math
import os
from pathlib import Path

import pytest
import tokenizers
import torch

from model.text import (
    CLIPConfig,
    CLIPText,
    T5Config,
    T5Encoder,
    build_word_tokenizer,
    load_clip_tokenizer,
    load_tokenizer,
    relative_buckets,
    tokenize,
    unknown_words,
)
from scenes import vocabulary

# first distance of each bucket of T5 (32 buckets, 128): recorded from transformers 5.23.0
FIRST_DISTANCES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
T5_TINY = T5Config(vocabulary=50, width=24, depth=2, heads=3, head_dim=10, mlp_hidden=40)
SHIPPED = Path(__file__).parent.parent / "weights/nano/tokenizer.json"
CLIP_TINY = CLIPConfig(vocabulary=50, length=9, width=24, depth=2, heads=3, mlp_hidden=40, eos_token_id=1)


def randomize(module):
    """Every parameter random, norm scales and biases too, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.data.normal_(std=0.3, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return module.requires_grad_(False)


def bucket(distance):
    f = max(i for i, first in enumerate(FIRST_DISTANCES) if first <= abs(distance))
    return f + (16 if distance > 0 else 0)


def weights(module):
    return {key: value.double() for key, value in module.state_dict().items()}


def attention(q, k, v, heads, scale, bias):
    """q, k, v (L, H·D) in float64; softmax(scale · q kᵀ + bias) v, head by head."""
    outputs = []
    for h, (q, k, v) in enumerate(zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1))):
        scores = scale * q @ k.T + bias[h]
        p = (scores - scores.max(-1, keepdim=True).values).exp()
        outputs.append(p / p.sum(-1, keepdim=True) @ v)
    return torch.cat(outputs, -1)


def t5_reference(w, ids, heads):
    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]

    L = len(ids)
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = torch.stack([torch.stack([table[bucket(k - q)] for k in range(L)]) for q in range(L)]).permute(2, 0, 1)
    x = w["shared.weight"][ids]
    for i in range(2):
        p = f"encoder.block.{i}.layer.0."
        h = norm(x, p + "layer_norm")
        q, k, v = (h @ w[f"{p}SelfAttention.{name}.weight"].T for name in "qkv")
        x = x + attention(q, k, v, heads, 1.0, bias) @ w[p + "SelfAttention.o.weight"].T
        p = f"encoder.block.{i}.layer.1."
        h = norm(x, p + "layer_norm")
        g, u = (h @ w[f"{p}DenseReluDense.{name}.weight"].T for name in ("wi_0", "wi_1"))
        g = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        x = x + (g * u) @ w[p + "DenseReluDense.wo.weight"].T
    return norm(x, "encoder.final_layer_norm")


def clip_reference(w, ids, heads):
    w = {key.removeprefix("text_model."): value for key, value in w.items()}

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    L = len(ids)
    x = w["embeddings.token_embedding.weight"][ids] + w["embeddings.position_embedding.weight"][:L]
    causal = torch.full((L, L), -math.inf, dtype=torch.float64).triu(1).expand(heads, L, L)
    for i in range(2):
        p = f"encoder.layers.{i}."
        h = norm(x, p + "layer_norm1")
        q, k, v = (linear(h, f"{p}self_attn.{name}_proj") for name in "qkv")
        h = attention(q, k, v, heads, (x.shape[-1] // heads) ** -0.5, causal)
        x = x + linear(h, p + "self_attn.out_proj")
        h = linear(norm(x, p + "layer_norm2"), p + "mlp.fc1")
        x = x + linear(h / (1 + torch.exp(-1.702 * h)), p + "mlp.fc2")
    return norm(x, "final_layer_norm")


def test_buckets():
    buckets = relative_buckets(512, 32, 128)
    for q, k in ((0, 511), (511, 0), (300, 300), *((200, 200 + d) for d in range(-200, 200))):
        assert buckets[q, k] == bucket(k - q)


def test_t5_equals_the_formula():
    t5 = randomize(T5Encoder(T5_TINY))
    ids = torch.randint(0, 50, (2, 110), generator=torch.Generator().manual_seed(1))  # beyond the last bucket's 91
    ids[1, 70:] = 0  # padding takes part
    expected = torch.stack([t5_reference(weights(t5), row, 3) for row in ids])
    torch.testing.assert_close(t5(ids).double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(t5.double()(ids), expected, atol=1e-12, rtol=0)


def test_clip_equals_the_formula():
    clip = randomize(CLIPText(CLIP_TINY))
    ids = torch.tensor([[5, 7, 3, 1, 0, 0], [9, 1, 8, 1, 2, 2], [1, 4, 4, 4, 4, 4]])  # the first end token counts
    expected = torch.stack([clip_reference(weights(clip), row, 3)[end] for row, end in zip(ids, (3, 1, 0))])
    torch.testing.assert_close(clip(ids).double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(clip.double()(ids), expected, atol=1e-12, rtol=0)


def test_clip_end_token_by_largest_id():
    clip = randomize(CLIPText(CLIPConfig(vocabulary=50, length=9, width=24, depth=2, heads=3, mlp_hidden=40)))
    ids = torch.tensor([[48, 7, 2, 49, 49, 49], [48, 49, 8, 3, 2, 49]])
    expected = torch.stack([clip_reference(weights(clip), row, 3)[end] for row, end in zip(ids, (3, 1))])
    torch.testing.assert_close(clip(ids).double(), expected, atol=2e-5, rtol=0)


def test_clip_sees_nothing_after_the_end_token():
    clip = randomize(CLIPText(CLIP_TINY))
    a, b = clip(torch.tensor([[5, 7, 1, 0, 0, 0], [5, 7, 1, 9, 30, 4]]))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    build_word_tokenizer(["move the red cube", "to the left of", "Blue", "sphere"]).save(str(path))
    return load_tokenizer(path)


def test_word_ids(tokenizer):
    words = ["blue", "cube", "left", "move", "of", "red", "sphere", "the", "to"]  # alphabetical, after three specials
    assert tokenizer.get_vocab_size() == 12
    ids = tokenize(tokenizer, ["Move the RED cube, to the left of the blue sphere!", ""], 14)
    sentence = "move the red cube to the left of the blue sphere".split()
    assert ids.tolist() == [[3 + words.index(word) for word in sentence] + [1, 0, 0], [1] + [0] * 13]


def test_new_words_follow_the_known_ones(tokenizer):
    ids = build_word_tokenizer(["a red zebra"], tokenizer).get_vocab()
    assert {word: i for word, i in ids.items() if i < 12} == tokenizer.get_vocab()
    assert (ids["a"], ids["zebra"], len(ids)) == (12, 13, 14)


def test_known_ids_with_gaps_stay(tmp_path, tokenizer):
    facts = json.loads(tokenizer.to_str())
    gone = facts["model"]["vocab"].pop("left")
    (tmp_path / "gaps.json").write_text(json.dumps(facts))
    known = load_tokenizer(tmp_path / "gaps.json")
    ids = build_word_tokenizer(["left of a cube"], known).get_vocab()
    assert {word: i for word, i in ids.items() if i < 12} == known.get_vocab() and gone not in ids.values()
    assert (ids["a"], ids["left"], len(ids)) == (12, 13, 13)


def test_shipped_ids_stay_when_training_goes_on():
    known = load_tokenizer(SHIPPED)
    ids = build_word_tokenizer(vocabulary("plain"), known).get_vocab()
    assert known.get_vocab().items() <= ids.items() and len(set(ids.values())) == len(ids)


def test_cut_prompt_warns_with_the_lost_words(tokenizer):
    with pytest.warns(UserWarning, match='longer than 6 tokens.*"left of the Sphere."'):
        ids = tokenize(tokenizer, ["move the cube to the left of the Sphere."], 6)
    assert ids.shape == (1, 6) and ids[0, -1] == 1 and 0 not in ids


def test_unknown_words(tokenizer):
    assert unknown_words(tokenizer, "Move the Zebra-like cube to the left of a sphere") == ["Zebra", "like", "a"]
    assert unknown_words(tokenizer, "move the cube") == []


def test_tokenizer_file_errors(tmp_path, tokenizer):
    path = tmp_path / "other.json"
    with pytest.raises(FileNotFoundError, match="found no file"):
        load_tokenizer(path)
    for damaged in ("{}", (tmp_path / "tokenizer.json").read_text()[:200]):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="Expected a tokenizers JSON file"):
            load_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        load_tokenizer(path)
    swapped = tokenizers.models.WordLevel({"<pad>": 1, "</s>": 0, "<unk>": 2}, unk_token="<unk>")
    tokenizers.Tokenizer(swapped).save(str(path))
    with pytest.raises(ValueError, match="Expected a T5 tokenizer.*'<pad>': 1"):
        load_tokenizer(path)


# ---- sub-word tokenizers: made-up vocabularies on every machine, the official files where they are

SENTENCES = [
    "Move the apple between the banana and the watermelon.",
    "",
    "   ",
    "  move\tTHE\n\nred   cube, don't they'll  ",
    "Caf\u00e9 cafe\u0301 \u0130stanbul \u01c5 \ufb01ne \u65e5\u672c\u8a9e \u20ac100 30\u00b0",
    "\U0001f600\U0001f44d\U0001f3fd \u200b\u3000\u00a0x \U00020000",
    "what </s> and <extra_id_0><pad>, <|endoftext|> or <|STARTOFTEXT|>hello<|startoftext|> inside",
    "no_underscore__here 12345 a-b/c ... ?!?! \x00 \x7f",
    "move the red cube to the left of the blue sphere " * 60,
    "x" * 3000,
]
MERGES = "m o|mo v|mov e</w>|t h|th e</w>|r e|re d</w>|c u|cu b|cub e</w>|l e|le f|lef t</w>|\u00c3 \u00a9|1 2|x x|xx xx"
MERGES = MERGES.split("|")


def write_clip(folder, merges=MERGES):
    folder.mkdir(exist_ok=True)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return folder


def write_t5(path):
    """A unigram tokenizer.json like T5's, but with a truncation and a padding of its own."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581move", "\u2581the", "\u2581red", "\u2581cu", "be", ","]
    pieces += "abcdefghijklmnopqrstuvwxyz1."
    scores = [0.0, 0.0, 0.0] + [-float(i) for i in range(2, len(pieces) - 1)]
    t5 = tokenizers.Tokenizer(tokenizers.models.Unigram(list(zip(pieces, scores)), unk_id=2))
    t5.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFKC(), tokenizers.normalizers.Strip(left=False)])
    t5.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    t5.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5.add_special_tokens(["<pad>", "</s>", "<unk>"])
    t5.save(str(path.with_name("plain.json")))
    t5.enable_truncation(5)
    t5.enable_padding(length=9, pad_id=3, pad_token="\u2581", direction="left")
    t5.save(str(path))


def official(name):
    """An official tokenizer file, or a skip that says what was looked for."""
    folders = [os.environ.get("SPATIALDIFF_TOKENIZERS"), Path(__file__).parents[1] / "weights"]
    for folder in filter(None, folders):
        for path in sorted(Path(folder).glob(f"**/{name}")):
            return path
    pytest.skip(f"no official {name} in the folder named by SPATIALDIFF_TOKENIZERS, nor in weights/")


def fitted(ids, length, pad):
    return ids + [pad] * (length - len(ids)) if len(ids) <= length else ids[: length - 1] + ids[-1:]


@pytest.mark.filterwarnings("ignore:The prompt is longer")
@pytest.mark.parametrize("kind, length, pad", [("t5", 512, 0), ("clip", 77, 49407)])
def test_official_ids(kind, length, pad):
    if kind == "t5":
        tokenizer = load_tokenizer(official("t5/tokenizer.json"))
    else:
        tokenizer = load_clip_tokenizer(official("clip/vocab.json").parent)
    items = json.loads((Path(__file__).parent / "data" / "golden_ids.json").read_text(encoding="utf-8"))["items"]
    assert len(items) == 12
    ids = tokenize(tokenizer, [item["prompt"] for item in items], length)
    for row, item in zip(ids.tolist(), items):
        assert row == fitted(item[f"{kind}_ids"], length, pad), item["prompt"]


@pytest.mark.filterwarnings("ignore:The prompt is longer")
@pytest.mark.parametrize("source", ["made-up", "official"])
def test_clip_ids_equal_transformers(source, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    folder = write_clip(tmp_path / "clip") if source == "made-up" else official("clip/vocab.json").parent
    ours = load_clip_tokenizer(folder)
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:] if line]
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    bos = transformers.AddedToken("<|startoftext|>", normalized=True, special=True)  # as in FLUX's tokenizer_config.json
    theirs = transformers.CLIPTokenizer(vocabulary, merges, bos_token=bos)
    expected = theirs(SENTENCES, padding="max_length", max_length=77, truncation=True).input_ids
    assert tokenize(ours, SENTENCES, 77).tolist() == expected
    assert {len(set(row)) > 2 for row in expected} == {True, False}  # not all unknown, the empty ones among them


@pytest.mark.filterwarnings("ignore:The prompt is longer")
@pytest.mark.parametrize("source", ["made-up", "official"])
def test_t5_ids_equal_transformers(source, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    if source == "made-up":
        path = tmp_path / "tokenizer.json"
        write_t5(path)
        file = str(tmp_path / "plain.json")
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **special)
    else:
        path = official("t5/tokenizer.json")
        theirs = transformers.T5TokenizerFast.from_pretrained(path.parent)
    expected = theirs(SENTENCES, padding="max_length", max_length=512, truncation=True).input_ids
    assert tokenize(load_tokenizer(path), SENTENCES, 512).tolist() == expected


def test_sub_word_padding_and_cut(tmp_path):
    write_t5(tmp_path / "tokenizer.json")
    t5, clip = load_tokenizer(tmp_path / "tokenizer.json"), load_clip_tokenizer(write_clip(tmp_path / "clip"))
    start, end = 512 + len(MERGES), 513 + len(MERGES)
    assert tokenize(t5, [""], 4).tolist() == [[1, 0, 0, 0]]
    assert tokenize(clip, [""], 4).tolist() == [[start, end, end, end]]
    for tokenizer, last, length in ((t5, 1, 5), (clip, end, 6)):  # move the red cu|be: CLIP makes one token of cube
        with pytest.warns(UserWarning, match=f'longer than {length} tokens.*: "{"be," if tokenizer is t5 else ","} the RED'):
            ids = tokenize(tokenizer, ["move the red cube, the RED cube"], length)
        assert ids.shape == (1, length) and ids[0, -1] == last and (ids[0, :-1] != last).all()
    with pytest.warns(UserWarning) as caught:  # cut inside a character of several bytes: all of it is lost
        tokenize(clip, ["move \U0001f600 on"], 4)
    assert caught[0].message.args[0].endswith('"\U0001f600 on".')


def test_clip_file_errors(tmp_path):
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    with pytest.raises(FileNotFoundError, match="vocab.json, found no file"):
        load_clip_tokenizer(tmp_path)
    write_clip(tmp_path)
    good, lines = vocabulary.read_text(), merges.read_text(encoding="utf-8").splitlines()
    vocabulary.write_text(good[:300])
    with pytest.raises(ValueError, match="cut off"):
        load_clip_tokenizer(tmp_path)
    for other in ("[1, 2]", good.replace("512", "[512]"), '{"<pad>": 0, "</s>": 1}', good.replace("endoftext", "other")):
        vocabulary.write_text(other)
        with pytest.raises(ValueError, match="Expected a CLIP vocabulary with"):
            load_clip_tokenizer(tmp_path)
    vocabulary.write_text(good)
    wrong = [lines[:-1], lines[:2], lines[:1] + lines[2:], lines[:-1] + [lines[-1][:-1]], lines[:-1] + ["xxx x"]]
    for change in (*wrong, [*lines[:2], lines[3], lines[2], *lines[4:]], [line + " z" for line in lines]):
        merges.write_text("\n".join(change), encoding="utf-8")
        with pytest.raises(ValueError, match=f"merges.txt to make the {len(MERGES)} tokens.*copy both"):
            load_clip_tokenizer(tmp_path)
    merges.unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt, found no file"):
        load_clip_tokenizer(tmp_path)
