"""What a person sees while a sweep draws: the time left, and the pictures as they come."""

from tqdm.auto import tqdm

from lorabook.show.display import in_notebook
from lorabook.show.grid import ImageGrid


class Live:
    """A progress bar over the pictures, and in a notebook the grid as far as it is drawn.

    Args:
        grid: a grid whose images are None until they are drawn.
        steps: how many steps of the denoising all pictures take together.
        shown: whether to show anything.
    """

    def __init__(self, grid: ImageGrid, steps: int, *, shown: bool = True):
        self.grid, self.shown, self.handle = grid, shown, None
        self.bar = tqdm(total=steps, desc="steps of all images", leave=False, disable=not shown)
        self.left = steps

    def stepped(self, count: int) -> None:
        """Tell that so many images took a step; some schedulers take more than they were asked for."""
        count = min(count, self.left)
        self.left -= count
        self.bar.update(count)

    def drew(self, images: dict[int, object]) -> None:
        """Put images in their places, by number, row by row."""
        width = len(self.grid.images[0])
        for number, image in images.items():
            self.grid.images[number // width][number % width] = image
        if self.shown and in_notebook() and not self.grid.is_whole:
            from IPython.display import display

            if self.handle is None:
                self.handle = display(self.grid, display_id=True)
            else:
                self.handle.update(self.grid)

    def close(self) -> None:
        """Take the bar away, and the grid, which is shown as the sweep's result."""
        self.bar.close()
        if self.handle is not None:
            self.handle.update({"text/plain": ""}, raw=True)
