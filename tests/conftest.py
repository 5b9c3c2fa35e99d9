import random
import warnings

import pytest
from PIL import Image

import lorabook as lb
from styles import creature


@pytest.fixture
def pipe():
    """A fresh bundled pipeline, without progress bars."""
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def creature_folder(tmp_path):
    """Six creatures with metadata.jsonl."""
    folder = tmp_path / "creatures"
    folder.mkdir()
    rng = random.Random(0)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for number in range(6):
            image, text = creature(rng)
            image.save(folder / f"{number}.png")
            metadata.write(f'{{"file_name": "{number}.png", "text": "{text}"}}\n')
    return folder


@pytest.fixture
def picture():
    """Makes small pictures of one colour."""
    return lambda color="red", size=(8, 8), mode="RGB": Image.new("RGB", size, color).convert(mode)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """A LoRA trained for three steps on six creatures, for tests of what comes after training."""
    folder = tmp_path_factory.mktemp("quick") / "quick"
    return lb.train_text_to_image(quick_config(output_dir=str(folder)))


def quick_config(**changes) -> "lb.TextToImageConfig":
    """A config of a run that ends within seconds."""
    told = dict(pretrained_model_name_or_path="tiny-sd", dataset_name="creatures", max_train_samples=6, seed=0,
                train_batch_size=2, max_train_steps=3, learning_rate=1e-3, rank=2)
    return lb.TextToImageConfig(**told | changes)


@pytest.fixture
def silent():
    """Let no warning pass unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
