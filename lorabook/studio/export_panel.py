"""What a person takes away: the code, the adapter, the picture."""

from collections.abc import Callable

import ipywidgets as widgets

from lorabook.studio.code import DIALECTS
from lorabook.studio.controls import button, line, menu, row, stack, words

_COPY = """<button class="lorabook-copy" title="copy the code" onclick="
const area = this.closest('.lorabook-take').querySelector('textarea');
area.select();
(navigator.clipboard ? navigator.clipboard.writeText(area.value) : Promise.reject())
  .catch(() => document.execCommand('copy'));
this.textContent = 'copied'; setTimeout(() => this.textContent = 'copy', 1200)">copy</button>"""


class ExportPanel:
    """The settings as code, a name to save the adapter by, and one for the picture; `box` is the widget."""

    def __init__(
        self,
        code: Callable[[str], str],
        save_adapter: Callable[[str], None],
        save_picture: Callable[[str], None],
    ):
        """Args: what gives the code in a dialect; what writes the adapter; what writes the picture."""
        self._code = code
        self.dialect = menu(
            "as",
            [(name.replace("a1111", "A1111 prompt"), name) for name in DIALECTS],
            lambda _: self.refresh(),
            about="whose code",
            flex="1 1 0",
        )
        self.text = widgets.Textarea(
            description="code", rows=11, layout={"width": "auto"}, style={"description_width": "0"}
        )
        self.text.add_class("lorabook-code")
        self.adapter = line(
            "adapter", lambda _: None, about="folder or .safetensors file to write", flex="1 1 0"
        )
        self.picture = line("picture", lambda _: None, about="PNG file to write", flex="1 1 0")
        self.adapter.value, self.picture.value = "studio-adapter", "studio.png"
        self.save_adapter = button(
            "save adapter",
            "write what takes part as one adapter, its scales baked in",
            lambda: save_adapter(self.adapter.value),
        )
        self.save_picture = button(
            "save picture",
            "write the picture, its settings inside",
            lambda: save_picture(self.picture.value),
        )
        self.box = stack(
            row(self.dialect, widgets.HTML(_COPY)),
            self.text,
            words("Scales are baked into the adapter; the settings are kept inside the picture."),
            row(self.adapter, self.save_adapter),
            row(self.picture, self.save_picture),
            kind="lorabook-take",
        )

    def refresh(self) -> None:
        """Let the code say what the settings are now."""
        self.text.value = self._code(self.dialect.value)
