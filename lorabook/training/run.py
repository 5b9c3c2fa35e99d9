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
from lorabook.training.devices import components_on, input_casts
from lorabook.training.loop import train
from lorabook.training.merged import merged_products
from lorabook.training.reports import open_trackers
from lorabook.training.setup import Setup
from lorabook.training.trainer import Trainer, TrainingData, make_trainer
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
    images: datasets.Dataset, share: float
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The images to learn from, and the last `share` of them, held out; None if the share is 0."""
    count = round(len(images) * share)
    rest = len(images) - count
    if share and not 0 < count < len(images):
        raise ValueError(
            f"validation_split {share} of {len(images)} images leaves {count} to validate on and "
            f"{rest} to learn from; both need at least one"
        )
    if not count:
        return images, None
    return images.select(range(rest)), images.select(range(rest, len(images)))


def check_batch(config: TrainingConfig, images: int) -> None:
    """Raise ValueError if a batch is larger than the data set."""
    if config.train_batch_size > images:
        raise ValueError(
            f"train_batch_size {config.train_batch_size} is larger than the data set of {images} "
            f"image(s); give one up to {images}"
        )


def fit(setup: Setup, data: TrainingData) -> TrainingRun:
    """Encode, train, save and return the run: the same for every method and model family."""
    config, accelerator, folder = setup.config, setup.accelerator, Path(setup.config.output_dir)
    identity = _identity(setup, data)
    state = find_checkpoint(folder, config.resume_from_checkpoint, identity)
    setup = replace(setup, given=replace(setup.given, seed=state.get("seed", setup.given.seed)))
    set_seed(setup.given.seed)
    trainer, held_out = make_trainer(setup, data, identity | {"seed": setup.given.seed}, state)
    images = None
    if config.validation_prompt and config.num_validation_images and accelerator.is_main_process:
        seeds = list(range(config.num_validation_images))
        images = ValidationImages(
            config.validation_prompt, seeds, folder, data.images, until=trainer.step
        )
    open_trackers(accelerator, config)
    busy = set(setup.family.text_encoders if config.train_text_encoder else ())
    busy.update(*(part.encoders_in_use for part in (trainer.images, held_out) if part))
    idle = [name for name in setup.family.encoders if name not in busy]
    with components_on(setup.family, idle, "cpu"):
        finished = _train(trainer, Callbacks(trainer, held_out, images))
    accelerator.wait_for_everyone()
    run = TrainingRun(
        folder / WEIGHT_NAME,
        trainer.history,
        setup.given.command,
        images.grid() if images else None,
        finished,
    )
    if accelerator.is_main_process:
        run.adapter = _write(trainer, folder)
        if setup.repository and finished:
            run.pushed = _push(run, setup.repository, config.hub_token)
    return run


def _train(trainer: Trainer, callbacks: Callbacks) -> bool:
    """Train to the last step, or to a stop button; returns whether it was the last step.

    A loss that is not finite writes the last good adapter before it raises.
    """
    models, cast = list(trainer.models.values()), trainer.config.use_dora
    cast = cast or trainer.accelerator.mixed_precision == "no"
    try:
        if trainer.step == trainer.steps:
            return True
        try:
            for model in models:
                model.train()
            callbacks.before_training()
            if trainer.config.compile:
                trainer.family.pipe.unet.compile_repeated_blocks()
            with merged_products(models), input_casts(models, cast):
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
        for model in models:
            model.eval()


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


def _push(run: TrainingRun, repository: str, token: str | None) -> str | None:
    """The adapter's address on the Hub; where the Hub fails, a warning and None."""
    try:
        return push_adapter(run, repository, token=token)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{error}; push_adapter({str(run.folder)!r}, {repository!r}) tries again", stacklevel=2
        )
        return None


def _identity(setup: Setup, data: TrainingData) -> dict:
    """What makes a run the one it is: its settings, its images and their texts, its base model."""
    config = setup.config
    texts = hashlib.sha256("\n".join(data.images["text"]).encode()).hexdigest()
    identity = {name: value for name, value in vars(config).items() if name not in FREE} | {
        "images": images_hash(data.images)[:16],
        "texts": texts[:16],
        "weights of the loss": data.weights,
        "resolution": setup.resolution,
        "mixed_precision": setup.accelerator.mixed_precision,
        "base model": Path(find_model(config.pretrained_model_name_or_path)).name,
        "images a step": config.train_batch_size * setup.accelerator.num_processes,
    }
    if setup.given_seed is not None:
        identity["seed"] = setup.given_seed
    return json.loads(json.dumps(identity))  # as it will be read
