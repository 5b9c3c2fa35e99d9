"""lorabook: learn, see and experiment with LoRA on diffusion models.

`import lorabook as lb` gives every public name; each is imported when it is first used, so that the
import itself takes no time.
"""

import logging
from importlib import import_module

__version__ = "0.5.0"

_HOME = {
    "bundled": "worlds",
    "world": "worlds",
    "block_map": "blocks",
    "load_pipeline": "pipelines",
    "load_captioned_images": "images.load",
    "load_instance_images": "images.load",
    "ImageGrid": "show.grid",
    "plot_losses": "show.plots",
    "plot_runs": "show.plots",
    "plot_lines": "show.plots",
    "plot_bars": "show.plots",
    "prompt_similarity": "metrics",
    "image_similarity": "metrics",
    "tolerance": "metrics",
    "load_adapter": "live.load",
    "LoadReport": "live.load",
    "base_model_of": "lora.source",
    "save_adapter": "live.save",
    "resize_adapter": "live.save",
    "extract_adapter": "live.save",
    "inspect_adapter": "lora.inspect",
    "set_scales": "live.scales",
    "scales_of": "live.scales",
    "PRESETS": "live.presets",
    "from_block_weights": "live.presets",
    "to_block_weights": "live.presets",
    "blend": "live.blend",
    "interference": "live.blend",
    "compare_blends": "sweeps.comparisons",
    "fuse": "live.fuse",
    "unfuse": "live.fuse",
    "fused": "live.fuse",
    "base_checksum": "live.fuse",
    "list_adapters": "live.manage",
    "enable_adapters": "live.manage",
    "disable_adapters": "live.manage",
    "remove_adapter": "live.manage",
    "unload_adapters": "live.manage",
    "move_adapter": "live.manage",
    "swap_adapter": "live.manage",
    "generate": "live.generate",
    "plot_blocks": "show.block_plot",
    "plot_spectra": "show.block_plot",
    "sweep": "sweeps.sweep",
    "block_effects": "sweeps.comparisons",
    "ScaleStudio": "studio.studio",
    "push_adapter": "hub",
    "energy_kept": "lowrank",
    "parameter_count": "lowrank",
    "doctor": "machine.doctor",
    "glossary": "show.glossary",
    "results_folder": "machine.environment",
    "TextToImageConfig": "training.config",
    "DreamBoothConfig": "training.config",
    "TrainingRun": "training.run",
    "train_text_to_image": "training.text_to_image",
    "train_dreambooth": "training.dreambooth",
}

__all__ = sorted(_HOME)

# transformers 5 announces, for each image processor that diffusers merely imports, that torchvision
# is not installed
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"lorabook has no name {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"lorabook.{_HOME[name]}"), name)


def __dir__():
    return __all__
