"""What a person sees while a run goes on: in a notebook a curve and a film strip that redraw in place, else a line."""

import time

from tqdm.auto import tqdm

from lorabook.show.display import in_notebook
from lorabook.show.grid import ImageGrid
from lorabook.show.plots import plot_losses

SHARE = 20  # a curve is drawn again after this many times the seconds that drawing it took
PATIENCE = (
    60  # seconds before the first curve; a shorter run has the bar alone, unless it draws pictures
)


class Display:
    """Progress bar, loss curve and film strip of one run; silent where `shown` is false."""

    def __init__(self, steps: int, done: int, shown: bool):
        self.shown, self.notebook = shown, shown and in_notebook()
        self.bar = tqdm(total=steps, initial=done, desc="training", disable=not shown)
        self.handles: dict[str, object] = {}
        self.wait_until = time.perf_counter() + PATIENCE

    def step(self) -> None:
        """One step is done."""
        self.bar.update()

    def losses(self, history: list[dict], last: bool = False) -> None:
        """Show the last loss, and the curve if it is time."""
        self.bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
        if self.notebook and (last and self.handles or time.perf_counter() > self.wait_until):
            started = time.perf_counter()
            self._show("curve", plot_losses(history))
            self.wait_until = time.perf_counter() + SHARE * (time.perf_counter() - started)

    def strip(self, grid: ImageGrid) -> None:
        """Show the validation pictures so far."""
        if self.notebook:
            self._show("strip", grid)

    def tell(self, sentence: str) -> None:
        """Say something beside the bar."""
        if self.shown:
            self.bar.write(sentence)

    def close(self) -> None:
        """The run has ended."""
        self.bar.close()

    def _show(self, what: str, thing) -> None:
        from IPython.display import display

        if what in self.handles:
            self.handles[what].update(thing)
        else:
            self.handles[what] = display(thing, display_id=True)
