"""From a setup and its images to a finished run: the way that both kinds of training share."""

import hashlib
import json
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from accelerate.utils import set_seed

from lorabook.hub import push_adapter
from lorabook.lora.formats.keys import WEIGHT_NAME
from lorabook.pipelines import find_model
from lorabook.training.cache import cache_folder, images_hash
from lorabook.training.callbacks import Watch
from lorabook.training.checkpoints import (
    find_checkpoint,
    pack,
    save_checkpoint,
    unpack,
    written_elsewhere,
)
from lorabook.training.config import TrainingConfig
from lorabook.training.dataset import EncodedImages, ImageTransform
from lorabook.training.devices import components_on, input_casts
from lorabook.training.display import Display
from lorabook.training.estimate import Estimate, memory_on_a_gpu
from lorabook.training.families import StableDiffusion
from lorabook.training.loop import train
from lorabook.training.lora import add_lora, trainable_parameters, write_lora
from lorabook.training.merged import merged_products
from lorabook.training.optimizers import make_optimizer, make_schedule, steps_in
from lorabook.training.run import TrainingRun
from lorabook.training.sampler import BatchSampler
from lorabook.training.setup import Setup, close
from lorabook.training.trackers import open_trackers
from lorabook.training.validation import FilmStrip, validation_loss

COMMAND = "command.txt"
# what may change when a run is gone on with; anything else makes it another run
FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "max_train_steps",
    "num_train_epochs",
    "validation_prompt",
    "num_validation_images",
    "validation_epochs",
    "report_to",
    "logging_dir",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "cache_dir",
    "cache_latents",
    "dataloader_num_workers",
    "local_rank",
    "pretrained_model_name_or_path",
    "train_data_dir",
    "instance_data_dir",
    "class_data_dir",
    "dataset_name",
    "seed",
    "output_kohya_format",
    "debug_loss",
    "train_batch_size",
    "pre_compute_text_embeddings",
    "sample_batch_size",
    "allow_tf32",
    "enable_xformers_memory_efficient_attention",
    "gradient_checkpointing",
    "compile",
}


@dataclass(frozen=True)
class TrainingData:
    """What is learned: images with their texts, in groups (instance, class) with their weights in the loss."""

    images: datasets.Dataset
    groups: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    held_out: datasets.Dataset | None = None
    repeats: int = 1


def split(
    images: datasets.Dataset, share: float
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The images to learn from, and the last `share` of them, kept out; None where the share is 0."""
    count = round(len(images) * share)
    if share and not 0 < count < len(images):
        raise ValueError(
            f"validation_split {share} of {len(images)} images leaves {count} to validate on and "
            f"{len(images) - count} to learn from; both need at least one"
        )
    if not count:
        return images, None
    return images.select(range(len(images) - count)), images.select(
        range(len(images) - count, len(images))
    )


def check_batch(config, images: int) -> None:
    """Raise ValueError if a batch is larger than the data set."""
    if config.train_batch_size > images:
        raise ValueError(
            f"train_batch_size {config.train_batch_size} is larger than the data set of {images} image(s); "
            f"give one up to {images}"
        )


def fit(setup: Setup, data: TrainingData) -> TrainingRun:
    """Encode, train, save, and return the run; the same for every method and family."""
    try:
        return _fit(setup, data)
    finally:
        close(setup)


def _fit(setup: Setup, data: TrainingData) -> TrainingRun:
    config, accelerator, family, folder = (
        setup.config,
        setup.accelerator,
        setup.family,
        Path(setup.config.output_dir),
    )
    identity = _identity(setup, data)
    progress = find_checkpoint(folder, config.resume_from_checkpoint, identity)
    told = replace(setup.told, seed=progress.numbers.get("seed", setup.told.seed))
    identity["seed"] = told.seed
    set_seed(told.seed)
    carriers = add_lora(family, config)
    order = BatchSampler(
        told.seed,
        data.groups,
        config.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        data.repeats,
    )
    steps, epoch = steps_in(config, order.batches)
    learning = {
        part: [p for key, p in trainable_parameters({part: model})]
        for part, model in carriers.items()
    }
    if accelerator.is_local_main_process and progress.step < steps:
        print(
            _estimate(setup, data, order, steps, [p for group in learning.values() for p in group])
        )
    with accelerator.local_main_process_first():
        examples, kept = _examples(setup, data.images), _kept(setup, data)
    optimizer = make_optimizer(learning, config, accelerator.num_processes)
    if (
        accelerator.scaler
    ):  # else accelerate's wrapper has nothing to do, and looks for packages at every step
        optimizer = accelerator.prepare(optimizer)
    schedule = make_schedule(optimizer, config, steps)
    state = {"optimizer": optimizer, "schedule": schedule, "scaler": accelerator.scaler}
    if progress.step:
        unpack(progress, dict(trainable_parameters(carriers)), **state)
        _say_other_steps(progress.numbers.get("steps", steps), steps, config.lr_scheduler)
    strip = _film_strip(setup, data, progress.step)

    def write(target: Path) -> Path:
        adapter = write_lora(target, carriers, told)
        (target / COMMAND).write_text(
            f"{told.command}\n"
        )  # with its paths, which the adapter file does not name
        return adapter

    def save() -> None:
        progress.tensors, progress.numbers = pack(dict(trainable_parameters(carriers)), **state)
        progress.numbers |= {"seed": told.seed, "steps": steps}
        save_checkpoint(folder, progress, identity, write, config.checkpoints_total_limit)

    watch = Watch(
        setup,
        progress,
        steps,
        epoch,
        dict(trainable_parameters(carriers)),
        save,
        (lambda: _validated(setup, kept)) if kept else None,
        strip,
        Display(steps, progress.step, accelerator.is_local_main_process),
    )
    open_trackers(accelerator, config)
    with components_on(family, idle_parts(family, config, examples, kept), "cpu"):
        finished = _train_watched(
            watch, examples, order, optimizer, schedule, data, write, carriers
        )
    accelerator.wait_for_everyone()
    adapter, pushed = folder / WEIGHT_NAME, None
    if accelerator.is_main_process:
        adapter = written_elsewhere(
            write, [folder, Path(tempfile.gettempdir()) / folder.absolute().name]
        )
        pushed = (
            _pushed(setup.repository, adapter, told, strip)
            if setup.repository and finished
            else None
        )
    return TrainingRun(
        adapter, progress.history, told.command, strip.grid() if strip else None, finished, pushed
    )


def idle_parts(
    family: StableDiffusion, config: TrainingConfig, *examples: EncodedImages | None
) -> list[str]:
    """The parts that training has no use for between validation pictures: all is encoded, and they do not learn."""
    busy = set(family.text_encoders) if config.train_text_encoder else set()
    busy.update(*(found.encoders_in_use for found in examples if found))
    return [part for part in family.encoders if part not in busy]


def _train_watched(
    watch: Watch, examples, order, optimizer, schedule, data, write, carriers
) -> bool:
    """Train to the last step, or to a stop button's interrupt; returns whether it was the last step.

    A loss that is not finite writes the last good adapter before it raises.
    """
    setup, progress = watch.setup, watch.progress
    try:
        if progress.step < watch.steps:
            for model in carriers.values():
                model.train()
            watch.begin()
            if setup.config.compile:
                setup.family.pipe.unet.compile_repeated_blocks()
            cast = setup.accelerator.mixed_precision == "no" or setup.config.use_dora
            with merged_products(carriers.values()), input_casts(carriers.values(), cast):
                train(
                    setup.accelerator,
                    setup.family,
                    examples,
                    order,
                    setup.config,
                    optimizer,
                    schedule,
                    progress,
                    watch.steps,
                    watch,
                    group_weights=data.weights,
                )
        return True
    except FloatingPointError as error:
        raise _with_good_kept(watch, error, write) from error
    except KeyboardInterrupt:
        if (
            not progress.step or setup.accelerator.num_processes > 1
        ):  # several may stand at different places
            raise
        try:
            watch.look()
        except FloatingPointError as error:
            raise _with_good_kept(watch, error, write) from error
        watch.keep()
        return False
    finally:
        watch.display.close()
        for model in carriers.values():
            model.eval()


def _with_good_kept(watch: Watch, error: FloatingPointError, write) -> FloatingPointError:
    """Write the last good adapter; returns the error that says so."""
    if not watch.good:
        return FloatingPointError(f"{error}; nothing was written")
    watch.put_back_good()
    folder = Path(watch.setup.config.output_dir)
    if watch.setup.accelerator.is_main_process:
        write(folder)
    return FloatingPointError(f"{error}; the adapter of step {watch.good_step} is kept in {folder}")


def _examples(setup: Setup, images: datasets.Dataset) -> EncodedImages:
    config = setup.config
    look = ImageTransform(
        setup.resolution,
        config.center_crop,
        config.random_flip,
        config.image_interpolation_mode,
    )
    return _encoded(setup, images, look)


def _encoded(setup: Setup, images: datasets.Dataset, look: ImageTransform) -> EncodedImages:
    config = setup.config
    return EncodedImages(
        setup.family,
        images,
        look,
        folder=cache_folder(config.cache_dir) if config.cache_latents else None,
        frozen_text=not config.train_text_encoder,
    )


def _kept(setup: Setup, data: TrainingData) -> EncodedImages | None:
    """The images kept out of training, cropped in the middle."""
    if data.held_out is None:
        return None
    look = ImageTransform(setup.resolution, interpolation=setup.config.image_interpolation_mode)
    return _encoded(setup, data.held_out, look)


def _film_strip(setup: Setup, data: TrainingData, until: int) -> FilmStrip | None:
    """The validation pictures, on the main process, where a prompt asks for them."""
    config = setup.config
    if not (
        config.validation_prompt
        and config.num_validation_images
        and setup.accelerator.is_main_process
    ):
        return None
    seeds = list(range(config.num_validation_images))
    return FilmStrip(config.validation_prompt, seeds, Path(config.output_dir), data.images, until)


def _validated(setup: Setup, kept: EncodedImages) -> float:
    with setup.accelerator.autocast():
        return validation_loss(setup.family, kept)


def _estimate(
    setup: Setup, data: TrainingData, order: BatchSampler, steps: int, learning: list
) -> Estimate:
    config, parameters = setup.config, sum(p.numel() for p in learning)
    batch = config.train_batch_size * len(data.groups)
    busy = setup.family.text_encoders if config.train_text_encoder else ()
    at_once = batch * order.processes * config.gradient_accumulation_steps
    return Estimate(
        len(data.images),
        steps,
        at_once,
        steps
        * config.train_batch_size
        * order.processes
        * config.gradient_accumulation_steps
        / order.epoch,
        parameters,
        4 * parameters,
        memory_on_a_gpu(
            setup.family,
            learning,
            setup.resolution,
            batch,
            busy if config.cache_latents else setup.family.encoders,
        ),
    )


def _say_other_steps(before: int, now: int, schedule: str) -> None:
    if before != now and not schedule.startswith("constant"):
        warnings.warn(
            f"the run had {before} steps and now has {now}: from here on the rate follows the {schedule} schedule "
            f"of {now}, so it ends elsewhere than a run of {now} from its start",
            stacklevel=2,
        )


def _identity(setup: Setup, data: TrainingData) -> dict:
    """What makes a run the one it is: its settings, its images and their texts, its base model."""
    config = setup.config
    settings = {key: value for key, value in vars(config).items() if key not in FREE}
    texts = hashlib.sha256("\n".join(data.images["text"]).encode()).hexdigest()
    found = settings | {
        "images": images_hash(data.images)[:16],
        "texts": texts[:16],
        "weights of the loss": data.weights,
        "resolution": setup.resolution,
        "mixed_precision": setup.accelerator.mixed_precision,
        "base model": Path(find_model(config.pretrained_model_name_or_path)).name,
        "images a step": config.train_batch_size * setup.accelerator.num_processes,
    }
    if setup.given_seed is not None:
        found["seed"] = setup.given_seed
    return json.loads(json.dumps(found))


def _pushed(
    repository: str, adapter: Path, told: TrainingConfig, strip: FilmStrip | None
) -> str | None:
    """The adapter's address on the Hub; where the Hub fails, a sentence, and the adapter stays where it is."""
    try:
        run = TrainingRun(adapter, [], told.command, strip.grid() if strip else None)
        return push_adapter(run, repository, token=told.hub_token)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{error}; push_adapter({str(adapter.parent)!r}, {repository!r}) tries again",
            stacklevel=2,
        )
        return None
