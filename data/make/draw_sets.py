"""Draws the captioned sets and the subjects into data/: python data/make/draw_sets.py"""

import json
import random
from pathlib import Path

from styles import SUBJECT_PLACES, creature, ink, mosaic, patch_cat, striped_boat

DATA = Path(__file__).resolve().parent.parent
SETS = {"creatures": (creature, 300, 1), "ink": (ink, 130, 2), "mosaic": (mosaic, 200, 3)}
SUBJECTS = {"patch_cat": patch_cat, "striped_boat": striped_boat}


def write_set(name: str) -> None:
    """An imagefolder: numbered PNGs and metadata.jsonl; no two pictures are the same."""
    draw, count, seed = SETS[name]
    rng, folder, seen = random.Random(seed), DATA / name, set()
    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        while len(seen) < count:
            image, text = draw(rng)
            if image.tobytes() in seen:
                continue
            file_name = f"{len(seen):04}.png"
            seen.add(image.tobytes())
            image.save(folder / file_name, optimize=True)
            metadata.write(json.dumps({"file_name": file_name, "text": text}) + "\n")


def write_subject(name: str) -> None:
    """Five pictures of one thing, in five places."""
    folder, rng = DATA / "subjects" / name, random.Random(4)
    folder.mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(SUBJECT_PLACES):
        SUBJECTS[name](place, rng).save(folder / f"{number}.png", optimize=True)


if __name__ == "__main__":
    for name in SETS:
        write_set(name)
    for name in SUBJECTS:
        write_subject(name)
