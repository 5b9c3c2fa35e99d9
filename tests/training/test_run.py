from pathlib import Path

from PIL import Image

from lorabook.show.grid import ImageGrid
from lorabook.training.run import TrainingRun

HISTORY = [
    {"step": 0, "validation_loss": 0.9},
    {"step": 1, "loss": 0.8, "seconds": 2.0},
    {"step": 2, "loss": 0.4, "seconds": 3.0, "validation_loss": 0.3},
]


def test_a_run_tells_its_steps_time_and_losses():
    run = TrainingRun(Path("x.safetensors"), HISTORY, "accelerate launch …")
    assert str(run) == (
        "2 steps in 5 s; loss 0.800 to 0.400, validation loss 0.900 to 0.300; "
        "adapter: x.safetensors"
    )


def test_a_run_shows_its_loss_curve():
    html = TrainingRun(Path("x.safetensors"), HISTORY, "")._repr_html_()
    assert 'alt="Training loss from 0.80 to 0.40' in html and "data:image/png;base64," in html


def test_the_pictures_of_a_run_are_told_in_words():
    grid = ImageGrid([[Image.new("RGB", (64, 64))]], ["step 5"], title='a "red" cat')
    html = TrainingRun(Path("x.safetensors"), HISTORY, "", grid)._repr_html_()
    assert "64 × 64 pixels each: a &quot;red&quot; cat; columns: step 5." in html
