"""What is drawn and how: prompts, seeds, steps, guidance, scheduler, size."""

import random
import re
from collections.abc import Callable

import ipywidgets as widgets

from lorabook.schedulers import SCHEDULERS
from lorabook.studio.controls import button, line, menu, put, row, stack, tip
from lorabook.studio.settings import StudioSettings

Change = Callable[[Callable[[StudioSettings], StudioSettings]], None]
_OWN = "the model's own"


class PromptPanel:
    """The words, `words`, and the settings of the call, `box`."""

    def __init__(self, change: Change, side: int):
        """Args: what takes a change of the settings; the pixels of the model's own pictures."""

        def to(name: str, read: Callable = lambda value: value) -> Callable:
            return lambda value: change(lambda settings: settings.with_(**{name: read(value)}))

        self.prompt = line(
            "prompt",
            to("prompt"),
            about="what to draw",
            placeholder="what to draw",
            flex="2 1 260px",
        )
        self.negative = line(
            "without",
            to("negative_prompt"),
            about="negative prompt: what to keep out",
            placeholder="what to keep out",
            flex="1 1 160px",
        )
        self.words = row(self.prompt, self.negative, kind="lorabook-words")
        self.seeds = line(
            "seeds",
            to("seeds", seeds_in),
            about="one picture for each, as 0, 1, 2",
            flex="1 1 80px",
        )
        self.another = button(
            "another", "a new seed", lambda: put(self.seeds, str(random.randrange(10_000)))
        )
        self.steps = _slider(
            widgets.IntSlider, "steps", 1, 50, 1, "denoising steps of the full picture"
        )
        self.guidance = _slider(
            widgets.FloatSlider, "guidance", 0, 15, 0.5, "how closely to follow the prompt"
        )
        self.steps.observe(lambda event: to("num_inference_steps")(event["new"]), names="value")
        self.guidance.observe(lambda event: to("guidance_scale")(event["new"]), names="value")
        names = [*SCHEDULERS, *(f"{name} karras" for name in SCHEDULERS if name.startswith("dpm"))]
        schedulers = [(_OWN, None), *((name, name) for name in names)]
        self.scheduler = menu(
            "scheduler", schedulers, to("scheduler"), about="how noise is taken away", flex="1 1 0"
        )
        sizes = [("own", None), *((str(size), size) for size in _sizes(side))]
        self.width = menu("width", sizes, to("width"), about="pixels across", flex="1 1 0")
        self.height = menu("height", sizes, to("height"), about="pixels down", flex="1 1 0")
        self.box = stack(
            row(self.seeds, self.another),
            row(self.steps),
            row(self.guidance),
            row(self.scheduler),
            row(self.width, self.height),
            kind="lorabook-call",
        )

    def show(self, settings: StudioSettings) -> None:
        """Let all controls stand as the settings say."""
        put(self.prompt, settings.prompt)
        put(self.negative, settings.negative_prompt)
        put(self.seeds, ", ".join(map(str, settings.seeds)))
        put(self.steps, settings.num_inference_steps)
        put(self.guidance, settings.guidance_scale)
        put(self.scheduler, settings.scheduler)
        put(self.width, settings.width)
        put(self.height, settings.height)


def seeds_in(text: str) -> tuple[int, ...]:
    """The seeds that a person typed, as "0, 1, 2". Raises ValueError for what is no whole number."""
    found = [part for part in re.split(r"[,;\s]+", text.strip()) if part]
    for part in found:
        if not re.fullmatch(r"-?\d{1,20}", part):
            raise ValueError(f"seeds are whole numbers, as 0, 1, 2; not {part!r:.60}")
    return tuple(map(int, found))


def _sizes(side: int) -> list[int]:
    """Around the model's own size, in multiples of 8."""
    return sorted({max(16, round(side * share / 8) * 8) for share in (0.5, 0.75, 1, 1.25, 1.5)})


def _slider(kind: type, label: str, low, high, step, about: str):
    made = kind(
        min=low,
        max=high,
        step=step,
        description=label,
        style={"description_width": "initial"},
        layout={"width": "auto", "flex": "1 1 0", "min_width": "0"},
    )
    tip(made, about)
    return made
