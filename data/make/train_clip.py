"""Trains tiny-clip, the text and image judge: python data/make/train_clip.py BASE.npz TOKENIZER OUT
[--steps N]

It sees the base world and the styles (other drawings than those in data/), as a real CLIP has seen
everything; its text tower becomes tiny-sd's text encoder.
"""

import argparse
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from make_tokenizer import add_older_files
from styles import creature, ink, mosaic

WIDTH = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    projection_dim=64,
)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    ends = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=dict(WIDTH, vocab_size=len(tokenizer), max_position_embeddings=77, **ends),
            vision_config=dict(WIDTH, image_size=64, patch_size=8),
            projection_dim=64,
        )
    )


def styled(count: int) -> list[tuple[np.ndarray, str]]:
    rng = random.Random(50_000)
    pairs = [
        style(rng)
        for style, share in ((creature, 4), (ink, 1), (mosaic, 2))
        for _ in range(share * count)
    ]
    return [(np.asarray(image), text) for image, text in pairs]


def contrastive_loss(logits: torch.Tensor, meanings: list[str]) -> torch.Tensor:
    """CLIP's loss, where pairs of one meaning count as positives together; logits: (batch, batch)."""
    same = torch.tensor([[float(a == b) for b in meanings] for a in meanings])
    target = same / same.sum(1, keepdim=True)
    return -(target * (logits.log_softmax(1) + logits.log_softmax(0).T)).sum(1).mean() / 2


def meaning(text: str) -> str:
    """A caption without the words that say nothing of the picture."""
    for opening in ("a drawing of ", "a picture of ", "a photo of "):
        text = text.removeprefix(opening)
    return text.replace("a cartoon ", "").removeprefix("an ").removeprefix("a ")


def main():
    parser = argparse.ArgumentParser()
    for name in ("base", "tokenizer", "out"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    clip = make_clip(tokenizer)
    data, extra = np.load(args.base), styled(1500)
    images = torch.from_numpy(
        np.concatenate([data["images"], np.stack([i for i, _ in extra])])
    ).permute(0, 3, 1, 2)
    captions = [str(c) for c in data["captions"]] + [c for _, c in extra]
    optimizer = torch.optim.AdamW(clip.parameters(), 1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps + 1, pct_start=0.1)
    start = time.time()
    for step in range(args.steps):
        chosen = torch.randint(0, len(images), (args.batch,))
        texts = [captions[i] for i in chosen]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        pixels = images[chosen].float() / 127.5 - 1
        shift = torch.randint(-2, 3, (2,)).tolist()
        pixels = F.pad(pixels, (2, 2, 2, 2), "replicate")[
            ..., 2 + shift[0] : 66 + shift[0], 2 + shift[1] : 66 + shift[1]
        ]
        logits = clip(**tokens, pixel_values=pixels).logits_per_image
        loss = contrastive_loss(logits, [meaning(t) for t in texts])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    clip.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    add_older_files(args.out)
    CLIPImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size=64,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(args.out)


if __name__ == "__main__":
    main()
