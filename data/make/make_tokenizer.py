"""Makes the tokenizer: byte-pair pieces of our own captions, so that their words are whole and all
else falls apart.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from styles import creature, ink, mosaic
from world import COLORS, FACELESS, KINDS, PLACES, caption

START, END = "<|startoftext|>", "<|endoftext|>"
EVERYDAY = (
    "an and the of in on with style photo picture painting portrait sitting standing flying wearing small "
    "big happy little cute old new sun moon sea snow rain city forest mountain garden hat ball game toy"
)


def corpus() -> list[str]:
    """Captions with every word that the pictures' captions know, and some everyday words."""
    rng = random.Random(0)
    told = [
        caption(kind, color, place, opening, outlined=True, smiling=kind in FACELESS)
        for kind in KINDS
        for color in COLORS
        for place in PLACES
        for opening in ("a drawing of", "a photo of")
    ]
    for style in (creature, ink, mosaic):
        told += [style(rng)[1] for _ in range(400)]
    return told + [EVERYDAY] * 40


def make_tokenizer() -> CLIPTokenizer:
    pieces = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)]
    )
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1400, end_of_word_suffix="</w>", initial_alphabet=bytes_, show_progress=False
    )
    pieces.train_from_iterator(corpus(), trainer)
    merges = [tuple(pair) for pair in json.loads(pieces.to_str())["model"]["merges"]]
    vocab = {piece: i for i, piece in enumerate(bytes_ + [b + "</w>" for b in bytes_])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab[START], vocab[END] = len(vocab), len(vocab) + 1
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def add_older_files(folder: str | Path) -> None:
    """The vocabulary and the merges in files of their own, beside tokenizer.json, for transformers
    4.
    """
    folder = Path(folder)
    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(pieces["vocab"], ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, pieces["merges"]), ""])
    )


if __name__ == "__main__":
    import sys

    make_tokenizer().save_pretrained(sys.argv[1])
