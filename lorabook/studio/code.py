"""The studio's settings as text that generates the same images elsewhere."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from pprint import pformat

from diffusers import DiffusionPipeline

from lorabook.live.generate import is_plain, prompt_arguments, takes_embeddings, words_of
from lorabook.live.inject import source_of
from lorabook.live.layers import layers_of, models_of
from lorabook.live.scales import layer_scales
from lorabook.pipelines import find_model
from lorabook.schedulers import scheduler_named
from lorabook.studio.generate import read_prompts, size_of
from lorabook.studio.settings import AdapterSettings, StudioSettings
from lorabook.worlds import DATA, bundled

_UNWEIGHTED = (
    "# diffusers draws these words without A1111's weights and BREAK, and the first 75 tokens of "
    "them; lb.generate draws them as the studio does"
)


def as_code(settings: StudioSettings, dialect: str, pipe: DiffusionPipeline) -> str:
    """Settings as code that runs as it is; the dialect is one of `DIALECTS`.

    What it cannot say stands in the code as a comment, as why a prompt cannot be read.
    """
    if dialect not in DIALECTS:
        known = ", ".join(DIALECTS)
        raise ValueError(f"there is no code for {dialect!r:.60}; there is for: {known}")
    try:
        if settings.scheduler:
            scheduler_named(settings.scheduler)
        prompts = read_prompts(settings)
        if not takes_embeddings(pipe, {}):  # a prompt is then passed on without A1111's signs
            texts = prompt_arguments(pipe, *prompts, {})
            negative = texts["negative_prompt"] or ""
            settings = settings.with_(prompt=texts["prompt"], negative_prompt=negative)
    except ValueError as error:
        return f"# {error}\n"
    adapters = {name: adapter for name, adapter in settings.adapters.items() if adapter.on}
    return DIALECTS[dialect](settings.with_(adapters=adapters), pipe) + "\n"


def _lorabook_code(settings: StudioSettings, pipe: DiffusionPipeline) -> str:
    scheduler = f", scheduler={settings.scheduler!r}" if settings.scheduler else ""
    lines = ["import torch", "", "import lorabook as lb", ""]
    lines.append(f"pipe = lb.load_pipeline({_model(pipe)!r}{scheduler})")
    for name in settings.adapters:
        source, comments = _source(pipe, name)
        lines += [*comments, f"lb.load_adapter(pipe, {source!r}, {name!r})"]
    if settings.adapters:
        scales = {n: one.scales(layers_of(pipe, n)) for n, one in settings.adapters.items()}
        lines.append(f"lb.set_scales(pipe, {_pretty(scales)})")
    call = _call(settings, pipe, _has_plain_prompts(settings, pipe))
    return "\n".join([*lines, call, "lb.ImageGrid([images])"])


def _diffusers_code(settings: StudioSettings, pipe: DiffusionPipeline) -> str:
    dtype = next(iter(models_of(pipe).values())).dtype
    half = f", torch_dtype={dtype}" if str(dtype) != "torch.float32" else ""
    device = f".to({pipe.device.type!r})" if pipe.device.type != "cpu" else ""
    model = f"AutoPipelineForText2Image.from_pretrained({find_model(_model(pipe))!r}{half}){device}"
    names, lines = "AutoPipelineForText2Image", ["", f"pipe = {model}"]
    if settings.scheduler:
        kind, options = scheduler_named(settings.scheduler)
        usual, config = inspect.signature(kind).parameters, pipe.scheduler.config
        more = "".join(
            f", {option}={value!r}"
            for option, value in options.items()
            if config.get(option, usual[option].default) != value
        )
        names += f", {kind.__name__}"
        lines.append(f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config{more})")
    for name in settings.adapters:
        lines += _loading_lines(pipe, name)
    if settings.adapters:
        numbers = [adapter.scale for adapter in settings.adapters.values()]
        lines.append(f"pipe.set_adapters({list(settings.adapters)!r}, {numbers!r})")
    for name, adapter in settings.adapters.items():
        lines += _scaling_lines(pipe, name, adapter)
    if not _has_plain_prompts(settings, pipe):
        lines.append(_UNWEIGHTED)
        words = {name: words_of(getattr(settings, name)) for name in ("prompt", "negative_prompt")}
        settings = settings.with_(**words)
    imports = ["import torch", f"from diffusers import {names}"]
    return "\n".join([*imports, *lines, _call(settings, pipe, True)])


def _loading_lines(pipe: DiffusionPipeline, name: str) -> list[str]:
    """How diffusers loads an adapter."""
    source, lines = _source(pipe, name)
    if "://" in source:
        reason = "diffusers fetches no web address; download the file and give its path"
        lines.append(f"# {name}: {reason}")
    path = bundled(f"adapters/{source}") or Path(source).expanduser()
    where = repr(str(path) if path.is_dir() else source)
    if path.is_file() or source.endswith(".safetensors") and "://" not in source:
        where = f"{str(path.parent)!r}, weight_name={path.name!r}"
    return [*lines, f"pipe.load_lora_weights({where}, adapter_name={name!r})"]


def _scaling_lines(pipe: DiffusionPipeline, name: str, adapter: AdapterSettings) -> list[str]:
    """How layers come to scales of their own, which diffusers' `set_adapters` does not give all."""
    lines = []
    scales = layer_scales(pipe, name, adapter.scales(models_of(pipe)))
    for component, layers in scales.items():
        if modules := _by_module(layers, adapter.scale):
            lines += [
                f"for module, scale in {_pretty(modules)}.items():",
                f"    for layer in pipe.{component}.get_submodule(module).modules():",
                f"        if {name!r} in getattr(layer, 'scaling', {{}}):",
                f"            layer.set_scale({name!r}, scale)",
            ]
    return lines


DIALECTS = {"lorabook": _lorabook_code, "diffusers": _diffusers_code}


def _by_module(scales: Mapping[str, float], usual: float) -> dict[str, float]:
    """Scales by the outermost modules that have one scale throughout, without those at `usual`."""
    modules = {}
    for name, scale in scales.items():
        path = name.split(".")
        starts = [".".join(path[: depth + 1]) for depth in range(len(path))]
        for start in starts:
            if len({s for n, s in scales.items() if f"{n}.".startswith(f"{start}.")}) == 1:
                break
        if scale != usual:
            modules[start] = scale
    return modules


def _call(settings: StudioSettings, pipe: DiffusionPipeline, is_plain: bool) -> str:
    """The line that generates: by the pipeline itself, or by `lb.generate`, which weighs words."""
    arguments = {"negative_prompt": settings.negative_prompt, **size_of(pipe, settings)}
    more = "".join(f", {name}={value!r}" for name, value in arguments.items() if value)
    steps = f"num_inference_steps={settings.num_inference_steps}"
    guidance = f"guidance_scale={settings.guidance_scale:g}"
    if is_plain:
        generator, indent = 'generator=torch.Generator("cpu").manual_seed(seed)', "\n" + " " * 15
        start = f"images = [pipe({settings.prompt!r}{more},{indent}{steps}, {guidance},{indent}"
        return f"{start}{generator}).images[0] for seed in {settings.seeds!r}]"
    start = f"images = [lb.generate(pipe, {settings.prompt!r}{more},\n{' ' * 22}{steps}, {guidance}"
    return f"{start}, seed=seed).images[0]\n          for seed in {settings.seeds!r}]"


def _has_plain_prompts(settings: StudioSettings, pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline itself encodes the prompts as the studio does."""
    prompts = settings.prompt, settings.negative_prompt
    return not takes_embeddings(pipe, {}) or all(is_plain(pipe, prompt) for prompt in prompts)


def _pretty(scales: object) -> str:
    return pformat(scales, sort_dicts=False, width=110)


def _model(pipe: DiffusionPipeline) -> str:
    """The Hub id, folder or bundled name that the pipeline was loaded from."""
    name = pipe.config.get("_name_or_path") or ""
    path = Path(name).resolve()
    return path.relative_to(DATA).as_posix() if name and path.is_relative_to(DATA) else name


def _source(pipe: DiffusionPipeline, name: str) -> tuple[str, list[str]]:
    """Where an adapter is; for one in memory only, a file for it and how to write that."""
    if source := source_of(pipe, name):
        return source, []
    file = f"{name}.safetensors"
    write = f"lb.save_adapter(pipe, {file!r}, name={name!r})"
    comment = f"# {name} is in memory only; write it first, where the studio is: {write}"
    return file, [comment]
