"""The words of the book, a sentence each, and the notebook that explains them."""

from collections.abc import Mapping

_NOTEBOOKS = {
    "00": "00_start_here",
    "01": "01_low_rank_theory",
    "02": "02_text_to_image_lora",
    "03": "03_anatomy_of_an_adapter",
    "04": "04_dreambooth",
    "05": "05_scale_sweeps",
    "06": "06_blending",
    "07": "07_fusion_and_speed",
    "08": "08_adapters_from_elsewhere",
}
TERMS = {
    "adapter": (
        "00",
        "A small file of weights that changes what a large model draws; here nearly always a LoRA.",
    ),
    "alpha": ("01", "A number fixed in training: a LoRA's product B A counts alpha / rank times."),
    "attention": (
        "02",
        "Layers in which parts of a picture look at each other; in cross-attention, at the prompt's words.",
    ),
    "base model": ("00", "The whole model that an adapter was made for, as it is without any."),
    "blend": ("06", "One adapter made of several, each with a weight."),
    "block": ("03", "A stretch of the UNet: down.0 to down.3, mid, up.0 to up.3."),
    "caption": ("02", "The text that says what is in a training picture."),
    "checkpoint": ("02", "All that a training needs to go on later, saved on the way."),
    "CLIP": ("00", "A model that tells how near a picture is to a text, or to another picture."),
    "ΔW": ("01", "What is added to a layer's weights W: in a LoRA, alpha / rank times B A."),
    "DoRA, LoHa, LoKr": ("08", "Other ways than B A to write down a ΔW with few numbers."),
    "embedding": ("01", "The numbers that the text encoder turns a prompt into."),
    "energy": (
        "01",
        "The sum of a matrix's squared numbers, which is that of its squared singular values.",
    ),
    "fuse": ("07", "Compute an adapter's ΔW into the weights, so that it costs no time any more."),
    "guidance scale": ("05", "How far each step goes from what it would draw without the prompt."),
    "instance prompt": (
        "04",
        "A rare word and a noun, which together come to mean one particular thing.",
    ),
    "Kohya, A1111": (
        "08",
        "Programs for training and for drawing, whose forms of files and prompts many use.",
    ),
    "latents": (
        "01",
        "A picture in the small form in which the UNet works; the VAE turns it into pixels.",
    ),
    "learning rate": ("01", "The length of a training step."),
    "loss": ("02", "How wrong the model's answer was; training makes it smaller."),
    "noise": (
        "00",
        "Random numbers in which each picture begins; the UNet takes them away step by step.",
    ),
    "over-fitting": (
        "04",
        "Learning the training pictures themselves, and bending everything else towards them.",
    ),
    "pipeline": ("00", "diffusers' object that holds all parts of a model and draws pictures."),
    "prior preservation": (
        "04",
        "Training on pictures of the class too, so that it stays as it was.",
    ),
    "prompt": ("00", "The text that says what to draw."),
    "rank": (
        "01",
        "Of how many columns times rows a matrix is the sum; for a LoRA, its room to learn.",
    ),
    "resnet": ("03", "A pair of convolutions, which draw from what is near in the picture."),
    "safetensors": ("02", "A file of numbers and text that can run no code."),
    "scale": ("00", "What ΔW is multiplied by: 0 is the base model, 1 the adapter as trained."),
    "scheduler": ("01", "The rule by which noise is taken away: how many steps, and how long."),
    "seed": ("00", "The number that the noise is made from; the same seed gives the same picture."),
    "singular value": (
        "01",
        "The strength of one of the parts, a column times a row, that make up a matrix.",
    ),
    "target modules": ("01", "The layers that an adapter is put beside."),
    "text encoder": ("00", "The model that turns a prompt into numbers."),
    "trigger word": (
        "04",
        "The word that an adapter was trained with, and that calls what it learned.",
    ),
    "UNet": ("00", "The model that says what is noise in a picture; a LoRA usually sits there."),
    "VAE": ("00", "The model between pixels and latents, both ways."),
    "validation loss": (
        "02",
        "The loss on pictures kept out of training, always with the same noise.",
    ),
}


class Glossary(Mapping):
    """Terms and what they mean; shows itself as a table."""

    def __init__(self, terms: Mapping[str, tuple[str, str]]):
        self._terms = dict(terms)

    def __getitem__(self, term: str) -> str:
        return self._terms[term][1]

    def __iter__(self):
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)

    def __repr__(self):
        return "\n".join(f"{term}: {self[term]}" for term in self)

    def _repr_markdown_(self) -> str:
        rows = [
            f"| **{term}** | {meaning} | [{number}]({_NOTEBOOKS[number]}.ipynb) |"
            for term, (number, meaning) in self._terms.items()
        ]
        return "\n".join(["| term | what it means | in |", "|---|---|---|", *rows])


def glossary() -> Glossary:
    """The words of the book, in the order of the alphabet.

    Returns: what each means, by term; in a notebook, a table with links to where it is explained.
    """
    return Glossary(TERMS)
