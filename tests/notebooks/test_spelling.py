"""The book's words are in a dictionary, or in the list below; and they are spelt in one way, the
British.
"""

import ast
import re

import pytest
from spellchecker import SpellChecker
from stored import BOOKS, PAGES, ROOT, prose

WORD = re.compile(
    r"(?<![\w.*/@])[A-Za-z][a-z]{2,}(?:['’][a-z]+)?(?![\w/]|\.\w)"
)  # no names such as LoRA, up.1, a_b
FIELD = """
    autocast autograd backend centre centred centres changelog checkpointing checksum checksums colour colours conda config configs cpu
    crossfade ctrl cuda dataclass dataclasses dataset ddim denoised denoiser denoising diff docstring doi downsamplers
    dpm dropdown eigenvectors favourite http https hypernetwork
    hypernetworks inpainting latents lbw loha lokr loopback metadata mps
    neighbour neighbours normalised openrail optimise optimiser quantised recognised redistributable resize resized resnet
    resnets safetensors scalings sdxl sks str subfolder svd timesteps tokenizer tokenizers tooltip tooltips tuple tuples tweaker unet
    unfuse unfused unfusing unipc upsampler upscaler
"""
NAMES = """
    bitsandbytes colab corda creativeml eckart frobenius golub hako ipywidgets jupyter kaggle kalajdzievski karras
    kohya liu loftq lorabook matplotlib modelspec numpy olora papermill peft pissa radford tensorboard torchao
    torchrun torchvision vetterli wandb webui
"""
KNOWN = set(FIELD.split() + NAMES.split())
NOT_BRITISH = re.compile(
    r"\b(?:color\w*|gray\w*|center\w*|behavior\w*|neighbor\w*|favor\w*|flavor\w*|catalogs?|labeled|labeling|modeled|modeling"
    r"|canceled|traveled|defense|licenses?|toward|artifacts?|analyz\w+"
    r"|(?!(?:re|over)?siz|priz|seiz|tokeniz)[a-z]+iz(?:e[drs]?|ers|ing|ations?))\b",
    re.I,
)
DICTIONARY = SpellChecker()


def docstrings(source):
    """A module's docstrings, without the names of arguments."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds)
    ]
    return re.sub(r"^ *[\w, ]+:", "", "\n\n".join(found), flags=re.M)


def words_in(cell):
    """A cell's prose, or the comments of its code."""
    return (
        cell.source
        if cell.cell_type == "markdown"
        else "\n".join(re.findall(r"(?:^|  )# (.*)", cell.source, re.M))
    )


def places():
    """(where, what stands there) of the cells of each notebook, of the pages, and of the package's
    docstrings.
    """
    modules, books = sorted(ROOT.glob("lorabook/**/*.py")), BOOKS.items()
    return {
        name: [(number, words_in(cell)) for number, cell in enumerate(book.cells)]
        for name, book in books
    } | {
        "pages": [(str(page.relative_to(ROOT)), page.read_text()) for page in PAGES],
        "docstrings": [
            (str(module.relative_to(ROOT)), docstrings(module.read_text())) for module in modules
        ],
    }


PLACES = places()


def unknown(markdown):
    """The words of a text that neither the dictionary nor the list has."""
    words = {re.sub(r"['’].*", "", word).lower() for word in WORD.findall(prose(markdown))}
    return sorted(words - KNOWN - DICTIONARY.known(words))


def not_british(markdown):
    return NOT_BRITISH.findall(prose(markdown))


@pytest.mark.parametrize("fault", [unknown, not_british], ids=["unknown", "not British"])
@pytest.mark.parametrize("place", PLACES)
def test_no_word_is_misspelt(place, fault):
    assert [(where, fault(markdown)) for where, markdown in PLACES[place] if fault(markdown)] == []


def test_a_slip_of_the_pen_is_found():
    assert unknown("The adapter lerns a pictrue's `colr`, not up.1's weigth.") == [
        "lerns",
        "pictrue",
        "weigth",
    ]
    assert not_british("normalized colors of the tokenizer, resized, towards us") == [
        "normalized",
        "colors",
    ]
