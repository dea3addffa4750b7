"""Text encoders: T5 turns the instruction into token features, CLIP into one pooled vector; and their tokenization.

In: token ids (B, L). Out: T5 (B, L, D) enters the text stream of the MMDiT; CLIP (B, D) enters its modulation. Agree
with transformers `T5EncoderModel` and `CLIPTextModel` as FLUX uses them (no mask: padding takes part in T5); parameters
have the names of the Hugging Face files. The miniature has the same two classes, smaller, and word-level token ids.
"""

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Config:
    """Defaults: the encoder of T5-v1.1-XXL."""

    vocabulary: int = 32128
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_hidden: int = 10240
    buckets: int = 32  # of relative distances: half for keys after the query
    max_distance: int = 128
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class CLIPConfig:
    """Defaults: the text model of CLIP ViT-L/14."""

    vocabulary: int = 49408
    length: int = 77  # learned positions
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_hidden: int = 3072
    norm_eps: float = 1e-5
    eos_token_id: int = 2  # 2 is historic and means: the end token is the largest id


def relative_buckets(length: int, buckets: int, max_distance: int, device: torch.device | None = None) -> Tensor:
    """Bucket of every (query, key) pair, (length, length), int64.

    Half of the buckets serve keys after the query. Of each half, the first half are exact distances, the rest grow
    logarithmically up to `max_distance`.
    """
    positions = torch.arange(length, device=device)
    distance = positions[None, :] - positions[:, None]  # key - query
    half = buckets // 2
    exact = half // 2
    n = distance.abs()
    growth = torch.log(n.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(n < exact, n, logarithmic) + half * (distance > 0)


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, has_bias_table: bool):
        super().__init__()
        width, inner = config.width, config.heads * config.head_dim
        self.head_dim = config.head_dim
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        nn.init.normal_(self.q.weight, std=(width * config.head_dim) ** -0.5)  # in place of scaling the scores
        nn.init.normal_(self.k.weight, std=width**-0.5)
        nn.init.normal_(self.v.weight, std=width**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)
        if has_bias_table:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)
            nn.init.normal_(self.relative_attention_bias.weight, std=width**-0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, L, head_dim)
        return self.o(x.transpose(1, 2).flatten(2))


class T5MLP(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.mlp_hidden, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_hidden, bias=False)
        self.wo = nn.Linear(config.mlp_hidden, config.width, bias=False)
        for linear in (self.wi_0, self.wi_1, self.wo):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Block(nn.Module):
    def __init__(self, config: T5Config, has_bias_table: bool):
        super().__init__()

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.width, eps=config.norm_eps)

        attention = nn.ModuleDict({"SelfAttention": T5Attention(config, has_bias_table), "layer_norm": norm()})
        mlp = nn.ModuleDict({"DenseReluDense": T5MLP(config), "layer_norm": norm()})
        self.layer = nn.ModuleList((attention, mlp))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, mlp = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        return x + mlp.DenseReluDense(mlp.layer_norm(x))


class T5Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocabulary, config.width)
        self.encoder = nn.ModuleDict(
            {
                "block": nn.ModuleList(T5Block(config, has_bias_table=i == 0) for i in range(config.depth)),
                "final_layer_norm": nn.RMSNorm(config.width, eps=config.norm_eps),
            }
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Token features (B, L, D) of ids (B, L); no mask, so padding takes part as FLUX has it."""
        blocks = self.encoder.block
        table = blocks[0].layer[0].SelfAttention.relative_attention_bias  # one table for all blocks
        buckets = relative_buckets(ids.shape[1], self.config.buckets, self.config.max_distance, ids.device)
        bias = table(buckets).permute(2, 0, 1).unsqueeze(0)  # (1, H, L, L)
        x = self.shared(ids)
        for block in blocks:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


class CLIPAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)  # (B, H, L, head_dim)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick_gelu


class CLIPBlock(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = CLIPAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = CLIPMLP(config.width, config.mlp_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPText(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocabulary, config.width),
                "position_embedding": nn.Embedding(config.length, config.width),
            }
        )
        for embedding in embeddings.values():
            nn.init.normal_(embedding.weight, std=0.02)
        layers = nn.ModuleList(CLIPBlock(config) for _ in range(config.depth))
        self.text_model = nn.ModuleDict(
            {
                "embeddings": embeddings,
                "encoder": nn.ModuleDict({"layers": layers}),
                "final_layer_norm": nn.LayerNorm(config.width, eps=config.norm_eps),
            }
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Pooled vector (B, D) of ids (B, L), L at most `config.length`: the state at the end token, no projection."""
        model, length = self.text_model, ids.shape[1]
        x = model.embeddings.token_embedding(ids) + model.embeddings.position_embedding.weight[:length]
        for layer in model.encoder.layers:
            x = layer(x)
        eos = self.config.eos_token_id
        end = ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)  # the first one
        x = x[torch.arange(len(x), device=x.device), end]
        return model.final_layer_norm(x)


def build_word_tokenizer(phrases: Iterable[str], known: Tokenizer | None = None) -> Tokenizer:
    """Word-level tokenizer that knows every word of `phrases`, for the miniature's T5 and CLIP alike.

    Lower case, punctuation dropped. Ids follow T5: pad 0, end token 1, unknown 2; then the words in alphabetical order.
    known: a tokenizer to extend, whose ids stay what they are.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]+"), "removed")
    lower, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    words = sorted({word for phrase in phrases for word, _ in split(lower(phrase))})
    vocabulary = dict(known.get_vocab()) if known else {"<pad>": 0, "</s>": 1, "<unk>": 2}
    first = max(vocabulary.values()) + 1  # ids of `known` may have gaps
    vocabulary |= {word: first + n for n, word in enumerate(word for word in words if word not in vocabulary)}
    tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """T5's (official or the miniature's) tokenizer from a tokenizer.json, whose own truncation and padding are ignored.

    FileNotFoundError if there is none, ValueError if it is not a T5 tokenizer: pad 0, end token 1.
    """
    path = Path(path)
    text = _read(path, "T5 tokenizer")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(
            f"Expected a tokenizers JSON file at {path}, found something else ({error}). Copy it again."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = {token: tokenizer.token_to_id(token) for token in ("<pad>", "</s>")}
    if found != {"<pad>": 0, "</s>": 1} or tokenizer.encode("").ids != [1]:
        raise ValueError(f"Expected a T5 tokenizer at {path} (<pad> is 0, </s> is 1 and ends every prompt), found {found} and "
                         f"{tokenizer.encode('').ids} for the empty prompt. Copy the tokenizer.json that belongs to T5.")
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    return tokenizer


CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # openai/CLIP simple_tokenizer.py


def load_clip_tokenizer(folder: str | Path) -> Tokenizer:
    """CLIP's byte-level BPE from vocab.json and merges.txt, as transformers' CLIPTokenizer builds it.

    FileNotFoundError if one is missing, ValueError if one is damaged or the two do not belong together: CLIP numbers 256
    bytes, 256 bytes that end a word, the result of every merge in order, the start and the end token.
    """
    folder = Path(folder)
    vocabulary_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    try:
        vocabulary = json.loads(_read(vocabulary_path, "CLIP vocabulary"))
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected JSON in {vocabulary_path}, found something else or a file that is cut off ({error}). "
                         "Copy it again.") from None
    lines = _read(merges_path, "list of CLIP merges").split("\n")[1:]  # the first line is a version comment
    merges = [tuple(line.split(" ")) for line in lines if line]
    start, end = "<|startoftext|>", "<|endoftext|>"
    is_vocabulary = isinstance(vocabulary, dict) and all(isinstance(i, int) for i in vocabulary.values())
    if not is_vocabulary or not {start, end} <= vocabulary.keys():
        raise ValueError(f"Expected a CLIP vocabulary with {start} and {end} in {vocabulary_path}, found another "
                         "model's. Copy vocab.json and merges.txt from the same `tokenizer` folder of FLUX.1.")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = {i: token for token, i in vocabulary.items()}
    tokens = [tokens.get(i) for i in range(len(vocabulary))]
    if (
        set(tokens[:512]) != {*alphabet, *(letter + "</w>" for letter in alphabet)}
        or tokens[512:] != [*map("".join, merges), start, end]
        or not all(len(pair) == 2 and vocabulary.keys() >= set(pair) for pair in merges)
    ):
        raise ValueError(f"Expected {merges_path} to make the {max(0, len(tokens) - 514)} tokens that {vocabulary_path} "
                         f"lists after its bytes, in that order; found {len(merges)} merges that make others. One of the two "
                         "is cut off or from another model: copy both from the same `tokenizer` folder of FLUX.1.")

    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=end, end_of_word_suffix="</w>", continuing_subword_prefix="", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([AddedToken(start, normalized=True), AddedToken(end, normalized=False)])
    ids = [(start, vocabulary[start]), (end, vocabulary[end])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    tokenizer.enable_padding(pad_id=vocabulary[end], pad_token=end)
    return tokenizer


def _read(path: Path, what: str) -> str:
    """The UTF-8 text of a tokenizer file."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a {what} at {path}, found no file. See weights.md for how to get it.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected a {what} at {path}, found no UTF-8 text ({error}). Copy it again.") from None


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Ids (B, length), int64: padded on the right with the tokenizer's pad id, or cut so that the end token is last.

    The tokenizer adds its own start and end tokens and has padding enabled (which is where its pad id is kept). A cut
    is announced by a warning with the words that are lost.
    """
    pad, rows = tokenizer.padding["pad_id"], []
    for text in texts:
        encoding = tokenizer.encode(text)
        ids = encoding.ids
        if len(ids) > length:
            lost = text[encoding.offsets[length - 1][0] :].strip()
            warnings.warn(f'The prompt is longer than {length} tokens; these words are left out: "{lost}".', stacklevel=2)
            ids = ids[: length - 1] + ids[-1:]
        rows.append(ids + [pad] * (length - len(ids)))
    return torch.tensor(rows)


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of `text`, as written, that a word-level tokenizer does not know; sub-word tokenizers spell any word."""
    if not isinstance(tokenizer.model, models.WordLevel):
        return []
    encoding, unknown = tokenizer.encode(text), tokenizer.token_to_id("<unk>")
    return [text[start:end] for i, (start, end) in zip(encoding.ids, encoding.offsets) if i == unknown]
