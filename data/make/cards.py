"""Writes the counts and checksums into data/'s cards: python data/make/cards.py

Each folder's README.md ends in a line that this script keeps true; a test compares.
"""

import hashlib
import re
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent


def contents(folder: Path) -> str:
    """The line that ends a card: number of files, their bytes, and one checksum over names and
    contents.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    size = sum(path.stat().st_size for path in files)
    return f"**Contents:** {len(files)} files, {size:,} bytes, SHA-256 over names and contents `{digest.hexdigest()}`"


def cards() -> list[Path]:
    """The README.md of each folder of data."""
    return sorted(p for p in DATA.rglob("README.md") if "make" not in p.parts)


if __name__ == "__main__":
    for card in cards():
        text = re.sub(r"\n*\*\*Contents:\*\*.*", "", card.read_text()).rstrip()
        card.write_text(f"{text}\n\n{contents(card.parent)}\n")
        print(card.relative_to(DATA), contents(card.parent))
