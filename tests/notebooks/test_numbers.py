"""Each number in a notebook's prose stands nearby in an output, or in the code as a literal."""

import ast
import re

import pytest
from stored import BOOKS, of_kind, outputs, text_of, without_code

NEARBY = 4  # cells before and after; the last section may look back at all
WRITTEN = r"(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?:\s?(%|(?:thousand|million|billion)\b))?"
NUMBER = re.compile(rf"(?<![\w.,/]){WRITTEN}(?!\w)")
FACTOR = {"%": 0.01, "thousand": 1e3, "million": 1e6, "billion": 1e9, None: 1}
NO_CLAIMS = "|".join(
    [
        r"!?\[[^\]]*\]\([^)]*\)",  # links and badges
        r"\*\*It takes\*\*[^\n]*?\.(?=\s|$)",  # minutes, which README repeats
        r"\*\*\d\.\*\*",
        r"^\d+\. ",  # exercises and lists
        r"(?<!\w)\d\d(?= ·)",
        r"(?<!\w)0\d(?![\w.])",  # notebooks
        r"\b(?:SD|SDXL|Stable Diffusion) \d\.\d",  # models
        r"arXiv:\S+",
        r"\b(?:19|20)\d\d\b(?!\s?%)",
    ]
)  # papers and years
KNOWN = {  # numbers that no run can show, and why
    ("00_start_here", "255"): "the largest value of a pixel",
    ("06_blending", "90"): "a right angle",
    ("07_fusion_and_speed", "15"): "how many steps people usually take",
    ("07_fusion_and_speed", "50"): "how many steps people usually take",
    ("07_fusion_and_speed", "256"): "the values of a byte",
    ("08_adapters_from_elsewhere", "1.1"): "what A1111 means by a pair of brackets",
}


def value(found):
    """A number as it is written, and half of its last digit; zeros at the end of a whole number may
    be rounding.
    """
    whole, decimals = found[1].replace(",", ""), found[2] or ""
    rounded = len(whole) - max(2, len(whole.rstrip("0")))
    half = 0.5 * 10.0 ** (1 - len(decimals) if decimals else max(0, rounded))
    return float(whole + decimals) * FACTOR[found[3]], half * FACTOR[found[3]]


def shown(text):
    """The numbers in an output's text, but for the sizes of pictures."""
    return [value(found)[0] for found in re.finditer(WRITTEN, re.sub(r"\b\d+x\w+", " ", text))]


def literals(source):
    """The numbers in a cell's code."""
    return [
        abs(node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float)
    ]


def stands_in(found, values):
    number, half = value(found)
    return any(abs(number - other) <= half * (1 + 1e-9) for other in values)


def numbers(markdown):
    return list(NUMBER.finditer(re.sub(NO_CLAIMS, " ", without_code(markdown), flags=re.M)))


@pytest.mark.parametrize("name", BOOKS)
def test_each_number_in_prose_stands_in_an_output_or_in_code(name):
    book = BOOKS[name]
    there = [(number, shown(text_of(output))) for number, output in outputs(book)]
    there += [(number, literals(cell.source)) for number, cell in of_kind("code", book)]
    last = max(
        (number for number, cell in of_kind("markdown", book) if "## What you saw" in cell.source),
        default=60,
    )
    missing = []
    for place, cell in of_kind("markdown", book):
        near = [
            other
            for number, values in there
            if place >= last or abs(number - place) <= NEARBY
            for other in values
        ]
        missing += [
            (place, found[0])
            for found in numbers(cell.source)
            if not stands_in(found, near) and (name, found[0]) not in KNOWN
        ]
    assert missing == []


@pytest.mark.parametrize("name, number", KNOWN)
def test_no_exception_outlives_its_number(name, number):
    assert number in [
        found[0] for _, cell in of_kind("markdown", BOOKS[name]) for found in numbers(cell.source)
    ]


@pytest.mark.parametrize(
    "written, measured, agrees",
    [
        ("77 %", 0.774, True),
        ("77 %", 0.78, False),
        ("1,000", 1000, True),
        ("2.6 billion", 2_567_463_684, True),
        ("2.5 billion", 2_567_463_684, False),
        ("130", 133.8, True),
        ("133", 133.8, False),
        ("0.15", 0.1461, True),
        ("3", 3.4, True),
    ],
)
def test_a_number_may_be_rounded_but_not_changed(written, measured, agrees):
    assert stands_in(NUMBER.fullmatch(written), [measured]) == agrees
