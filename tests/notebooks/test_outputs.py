import hashlib
import re

import pytest
from stored import BOOKS, ROOT, outputs, text_of

PRIVATE = {
    "a path": r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|var|mnt|content|kaggle|Users)\b|\b[A-Z]:\\|~/|\.cache\b|site-pack",
    "a date": r"\b(?:19|20)\d\d-\d\d-\d\d|\b\d{1,2}\.? (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]* \d{4}",
    "a time": r"\b\d{1,2}:\d\d(?::\d\d)?\b",
    "a machine": r"\blocalhost\b|\b\d{1,3}(?:\.\d{1,3}){3}\b|https?://[\w.-]+:\d|\b[\w.]+@[\w-]+\.\w",
    "an object's address": r"\bat 0x[0-9A-Fa-f]+",
    "a warning": r"[Ww]arning\b|\b[Dd]eprecated\b|\bTraceback\b",
    "a progress bar": r"\d(?:it/s|s/it)\b|%\|",
    "a colour of the terminal": "\x1b\\[",
}
SAMPLES = {
    "a path": "saved in /tmp/lora/x",
    "a date": "on 2026-11-22",
    "a time": "at 09:42",
    "a machine": "http://gpu1:8888",
    "an object's address": "<Image at 0x7F85AF>",
    "a warning": "FutureWarning: soon",
    "a progress bar": " 3%|# | 2.1it/s",
    "a colour of the terminal": "\x1b[31mred",
}


@pytest.mark.parametrize("kind", PRIVATE)
@pytest.mark.parametrize("name", BOOKS)
def test_no_output_shows(name, kind):
    shown = [
        (number, re.search(PRIVATE[kind], text_of(output)))
        for number, output in outputs(BOOKS[name])
    ]
    assert [(number, found[0]) for number, found in shown if found] == []


@pytest.mark.parametrize("kind", PRIVATE)
def test_what_no_output_may_show_would_be_found(kind):
    assert re.search(PRIVATE[kind], SAMPLES[kind])
    assert not re.search(
        PRIVATE[kind],
        "rank 16: 1,546,240 numbers in 0.86 s, 12 × 3, you/my-lora, torch 2.13.0, word:1.4",
    )


def test_the_checksum_that_is_shown_of_a_bundled_adapter_is_its_own():
    shown = [
        found
        for book in BOOKS.values()
        for _, output in outputs(book)
        for found in re.findall(
            r"pytorch_lora_weights.safetensors, .* SHA-256 (\w+)", text_of(output)
        )
    ]
    sums = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in ROOT.glob("data/adapters/*/*.safetensors")
    ]
    assert shown and all(any(full.startswith(part) for full in sums) for part in shown)


@pytest.mark.parametrize("name", BOOKS)
def test_nothing_was_written_to_stderr(name):
    assert [
        (number, output.text)
        for number, output in outputs(BOOKS[name])
        if output.get("name") == "stderr"
    ] == []


@pytest.mark.parametrize("name", BOOKS)
def test_every_picture_says_in_words_what_it_shows(name):
    pictures = [
        (number, kind, output.metadata)
        for number, output in outputs(BOOKS[name])
        for kind in output.get("data", {})
        if kind.startswith("image/")
    ]
    assert [
        (number, kind)
        for number, kind, about in pictures
        if not about.get(kind, {}).get("alt", "").strip()
    ] == []
