"""lorabook: learn, see and experiment with LoRA on diffusion models.

`import lorabook as lb` gives every public name; each is imported when it is first used, so that the
import itself takes no time.
"""
import logging
from importlib import import_module

__version__ = "0.5.0"

_HOME = {
    "bundled": "worlds", "world": "worlds",
    "block_map": "blocks",
    "load_pipeline": "pipelines",
    "load_captioned_images": "images", "load_instance_images": "images",
    "ImageGrid": "grid",
    "plot_losses": "plots", "plot_runs": "plots", "plot_lines": "plots", "plot_bars": "plots",
    "prompt_similarity": "metrics", "image_similarity": "metrics", "tolerance": "metrics",
    "load_adapter": "adapters.load", "LoadReport": "adapters.report", "base_model_of": "adapters.about",
    "save_adapter": "adapters.save", "resize_adapter": "adapters.save", "extract_adapter": "adapters.save",
    "inspect_adapter": "adapters.inspect",
    "set_scales": "adapters.scales", "scales_of": "adapters.scales", "PRESETS": "adapters.presets",
    "from_block_weights": "adapters.block_weights", "to_block_weights": "adapters.block_weights",
    "blend": "adapters.blend", "interference": "adapters.blend", "compare_blends": "comparisons",
    "fuse": "adapters.fuse", "unfuse": "adapters.fuse", "fused": "adapters.fuse", "base_checksum": "adapters.fuse",
    "list_adapters": "adapters.manage", "enable_adapters": "adapters.manage", "disable_adapters": "adapters.manage",
    "remove_adapter": "adapters.manage", "unload_adapters": "adapters.manage", "move_adapter": "adapters.manage",
    "swap_adapter": "adapters.manage",
    "generate": "adapters.generate",
    "plot_blocks": "block_plot", "plot_spectra": "block_plot",
    "sweep": "sweeps.sweeping", "block_effects": "comparisons", "ScaleStudio": "studio.studio",
    "push_adapter": "hub", "energy_kept": "lowrank", "parameter_count": "lowrank",
    "doctor": "checkup", "glossary": "terms", "results_folder": "places",
    "TextToImageConfig": "training.config", "DreamBoothConfig": "training.config", "TrainingRun": "training.run",
    "train_text_to_image": "training.text_to_image", "train_dreambooth": "training.dreambooth",
}

__all__ = sorted(_HOME)

# transformers 5 announces, for each image processor that diffusers merely imports, that torchvision is not installed
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage())


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"lorabook has no name {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"lorabook.{_HOME[name]}"), name)


def __dir__():
    return __all__
