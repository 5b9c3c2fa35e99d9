"""A training run, from a setup and its images to what the call returns."""

import hashlib
import html
import json
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
from accelerate.utils import set_seed

from lorabook.hub import push_adapter
from lorabook.lora.formats.keys import WEIGHT_NAME
from lorabook.pipelines import find_model
from lorabook.show.display import image_tag
from lorabook.show.grid import ImageGrid
from lorabook.show.plots import Plot, plot_losses
from lorabook.training.cache import images_hash
from lorabook.training.callbacks import Callbacks
from lorabook.training.checkpoints import find_checkpoint
from lorabook.training.config import TrainingConfig
from lorabook.training.loop import train
from lorabook.training.lora import merged_products
from lorabook.training.reports import open_trackers
from lorabook.training.setup import Setup
from lorabook.training.trainer import Trainer, TrainingData
from lorabook.training.validation import ValidationImages

# Settings that may change when a run goes on; with any other changed it is another run.
# fmt: off
FREE = {
    "output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
    "max_train_steps", "num_train_epochs", "validation_prompt", "num_validation_images",
    "validation_epochs", "report_to", "logging_dir", "push_to_hub", "hub_model_id", "hub_token",
    "cache_dir", "cache_latents", "dataloader_num_workers", "local_rank", "seed", "compile",
    "pretrained_model_name_or_path", "train_data_dir", "instance_data_dir", "class_data_dir",
    "dataset_name", "output_kohya_format", "debug_loss", "train_batch_size", "allow_tf32",
    "pre_compute_text_embeddings", "sample_batch_size", "gradient_checkpointing",
    "enable_xformers_memory_efficient_attention",
}
# fmt: on


@dataclass
class TrainingRun:
    """A training run; shows its loss and its images in a notebook.

    Attributes:
        adapter: The adapter file.
        history: A record a step: `step`, `loss`, `learning_rate`, `seconds`; some have
            `validation_loss`, `prompt_similarity` and `image_similarity`.
        command: The command line that repeats the run.
        grid: Images of the validation prompt, a row a seed and a column a step, or None.
        finished: Whether it came to its last step. If it was stopped,
            `resume_from_checkpoint="latest"` goes on with it.
        pushed: The adapter's address on the Hub, or None.
    """

    adapter: Path
    history: list[dict] = field(repr=False)
    command: str = field(repr=False)
    grid: ImageGrid | None = field(default=None, repr=False)
    finished: bool = True
    pushed: str | None = None

    @property
    def folder(self) -> Path:
        """The folder with the adapter, the checkpoints and the images."""
        return self.adapter.parent

    @property
    def validation_losses(self) -> list[float]:
        """The validation loss, from before the first step to after the last."""
        return [record["validation_loss"] for record in self.history if "validation_loss" in record]

    @property
    def losses(self) -> list[float]:
        """The training loss of each step."""
        return [record["loss"] for record in self.history if "loss" in record]

    def plot(self) -> Plot:
        """The loss curves, and the similarities where they were measured."""
        return plot_losses(self.history)

    def __str__(self):
        losses, validation = self.losses, self.validation_losses
        seconds = sum(record.get("seconds", 0) for record in self.history)
        words = f"{len(losses)} steps in {seconds:.0f} s; loss {losses[0]:.3f} to {losses[-1]:.3f}"
        if validation:
            words += f", validation loss {validation[0]:.3f} to {validation[-1]:.3f}"
        if not self.finished:
            words = f"stopped: {words}"
        pushed = f", pushed to {self.pushed}" if self.pushed else ""
        return f"{words}; adapter: {self.adapter}{pushed}"

    def _repr_html_(self):
        figures = [self.plot(), *([self.grid] if self.grid else [])]
        images = "".join(image_tag(figure._repr_png_(), figure.alt) for figure in figures)
        return f"<p>{html.escape(str(self))}</p>{images}"


def split(
    images: datasets.Dataset, config: TrainingConfig, repeats: int = 1
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The images to learn from, and the last `validation_split` of them, held out, or None."""
    count = round(len(images) * config.validation_split)
    rest = len(images) - count
    if config.validation_split and not 0 < count < len(images):
        raise ValueError(
            f"validation_split {config.validation_split} of {len(images)} images leaves {count} to "
            f"validate on and {rest} to learn from; both need at least one"
        )
    if config.train_batch_size > rest * repeats:
        raise ValueError(
            f"train_batch_size {config.train_batch_size} is larger than the data set of "
            f"{rest * repeats} image(s); give one up to {rest * repeats}"
        )
    if not count:
        return images, None
    return images.select(range(rest)), images.select(range(rest, len(images)))


def fit(setup: Setup, data: TrainingData) -> TrainingRun:
    """Encode, train, save and return the run: the same for every method and model family."""
    config, accelerator, folder = setup.config, setup.accelerator, Path(setup.config.output_dir)
    identity = _identity(setup, data)
    state = find_checkpoint(folder, config.resume_from_checkpoint, identity)
    config = replace(config, seed=state.get("seed", config.seed))
    setup, identity = replace(setup, config=config), identity | {"seed": config.seed}
    set_seed(config.seed)
    trainer = Trainer(setup, data, identity, state)
    images = None
    if config.validation_prompt and config.num_validation_images and accelerator.is_main_process:
        images = ValidationImages(config, data.images, until=trainer.step)
    open_trackers(accelerator, config)
    busy = set(setup.family.text_encoders if config.train_text_encoder else ())
    busy.update(*(part.encoders_in_use for part in (trainer.images, trainer.held_out) if part))
    idle = [name for name in setup.family.encoders if name not in busy]
    with setup.family.on_device(idle, "cpu"):
        finished = _train(trainer, Callbacks(trainer, images))
    accelerator.wait_for_everyone()
    grid = images.grid() if images else None
    run = TrainingRun(folder / WEIGHT_NAME, trainer.history, config.command, grid, finished)
    if accelerator.is_main_process:
        run.adapter = _write(trainer, folder)
        if config.push_to_hub and finished:
            run.pushed = _push(run, config)
    return run


def _train(trainer: Trainer, callbacks: Callbacks) -> bool:
    """Train to the last step, or to a stop button; returns whether it was the last step.

    A loss that is not finite writes the last good adapter before it raises.
    """
    try:
        if trainer.step == trainer.steps:
            return True
        try:
            trainer.learn(True)
            callbacks.before_training()
            if trainer.config.compile:
                trainer.family.pipe.unet.compile_repeated_blocks()
            with merged_products(trainer.models.values()):
                train(trainer, callbacks.after_step)
            return True
        except KeyboardInterrupt:
            # several processes may stand at different steps
            if not trainer.step or trainer.accelerator.num_processes > 1:
                raise
        callbacks.read_losses()
        callbacks.save()
        return False
    except FloatingPointError as error:
        if not callbacks.finite_weights:
            raise FloatingPointError(f"{error}; nothing was written") from error
        callbacks.restore_finite_weights()
        folder = Path(trainer.config.output_dir)
        if trainer.accelerator.is_main_process:
            trainer.write_adapter(folder)
        raise FloatingPointError(
            f"{error}; the adapter of step {callbacks.finite_step} is kept in {folder}"
        ) from error
    finally:
        callbacks.display.bar.close()
        trainer.learn(False)


def _write(trainer: Trainer, folder: Path) -> Path:
    """Write the adapter into the output folder, or where that is full into the temporary one."""
    try:
        return trainer.write_adapter(folder)
    except OSError as error:
        other = Path(tempfile.gettempdir(), folder.absolute().name)
        warnings.warn(
            f"{folder} cannot take the adapter ({error.strerror or error}); it is written to "
            f"{other}",
            stacklevel=2,
        )
        return trainer.write_adapter(other)


def _push(run: TrainingRun, config: TrainingConfig) -> str | None:
    """The adapter's address on the Hub; where the Hub fails, a warning and None."""
    try:
        return push_adapter(run, config.repository, token=config.hub_token)
    except (OSError, ValueError) as error:
        again = f"push_adapter({str(run.folder)!r}, {config.repository!r})"
        warnings.warn(f"{error}; {again} tries again", stacklevel=2)
        return None


def _identity(setup: Setup, data: TrainingData) -> dict:
    """What makes a run the one it is: its settings, its images and their texts, its base model."""
    config = setup.config
    texts = hashlib.sha256("\n".join(data.images["text"]).encode()).hexdigest()
    identity = {name: value for name, value in vars(config).items() if name not in FREE} | {
        "images": images_hash(data.images)[:16],
        "texts": texts[:16],
        "weights of the loss": data.weights,
        "base model": Path(find_model(config.pretrained_model_name_or_path)).name,
        "images a step": config.train_batch_size * setup.accelerator.num_processes,
    }
    if setup.is_seeded:
        identity["seed"] = config.seed
    return json.loads(json.dumps(identity))  # as it will be read
