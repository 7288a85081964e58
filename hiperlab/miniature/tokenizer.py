"""Stage tokenizer: a byte-level BPE in CLIP's form, learnt from the grammar's captions and a list of plain words.

CLIP's own 49408 words would cost 6 million parameters, half of the U-Net, to embed a grammar of some hundred words.
Any text can still be tokenized: what was never seen falls apart into bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from hiperlab.miniature.draw_shard import Source, wording
from hiperlab.miniature.plan import Workshop
from hiperlab.world.subjects import PROMPTS, TEMPLATES
from hiperlab.world.vocabulary import ACCESSORIES, CLOSE, COLOURS, KINDS, LIGHTS, PATTERNS, PLACES, POSES, STYLES

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
SUFFIX = "</w>"


def corpus(seed: int, captions: int, words: Sequence[str]) -> Iterator[str]:
    """What the merges are learnt from: captions, every phrase the parser knows, prompts, plain words.

    Words and phrases are repeated so that each becomes one token: a class noun must be one to start a concept from.

    Args:
        seed: of the captions.
        captions: how many.
        words: further plain words.
    """
    source = Source("main", seed)
    for number in range(captions):
        yield wording(source, number, 0, source.picture(number))
    tables = (POSES, PLACES, STYLES, ACCESSORIES, LIGHTS)
    phrases = [phrase for table in tables for values in table.values() for phrase in values]
    for text in [*phrases, *CLOSE, *KINDS, *COLOURS, *PATTERNS, *PROMPTS, *TEMPLATES, *words]:
        yield from [text.replace("{}", "")] * 20


def learn(texts: Iterator[str], vocabulary: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn a BPE in CLIP's form.

    Args:
        texts: to learn from.
        vocabulary: most tokens, the two special ones included; at least 514 (256 bytes, alone and ending a word).

    Returns:
        Token -> id, START and END last (open_clip finds the end as the largest id), and the merges in order.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2 - len(letters), initial_alphabet=letters, end_of_word_suffix=SUFFIX,
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    merges = _merges(bpe)
    # CLIP's order: every byte, every byte that ends a word, the merges, the special tokens
    tokens = [*letters, *(letter + SUFFIX for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    return vocab, merges


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    pairs = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs]  # type: ignore[misc]


def clip_tokenizer(vocab: dict[str, int], merges: Any) -> Any:
    """The transformers tokenizer: 77 tokens, padded with the end token as Stable Diffusion's."""
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )


def load(folder: Path) -> Any:
    """The tokenizer of a folder."""
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def encode(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Texts -> token ids (B, 77) int64, cut and padded."""
    out = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH)
    return np.asarray(out["input_ids"], dtype=np.int64)


def pieces(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text alone, without start, end and padding."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def name_of(tokenizer: Any) -> str:
    """12 hex digits of vocabulary and order: cached token ids belong to one tokenizer."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:12]


def work(shop: Workshop, *, vocabulary: int, captions: int, words: list[str]) -> dict[str, Any]:
    """The stage. Its check: every kind is one token, any text survives the way there and back."""
    tokenizer = clip_tokenizer(*learn(corpus(shop.seed, captions, words), vocabulary))
    tokenizer.save_pretrained(shop.weights("tokenizer"))
    loaded = load(shop.weights("tokenizer"))
    single = [kind for kind in KINDS if len(pieces(loaded, kind)) == 1]
    odd = "<my-cat> naïve 猫 1234 wørd"
    back = loaded.decode(pieces(loaded, odd))
    lengths = [int((encode(loaded, [text])[0] != loaded.eos_token_id).sum()) for text in PROMPTS]
    check = {
        "tokens": len(loaded),
        "kinds_in_one_token": f"{len(single)} of {len(KINDS)}",
        "any_text_survives": "".join(back.split()) == "".join(odd.split()),
        "longest_prompt_tokens": max(lengths),
    }
    return {"status": "finished", "check": check}
