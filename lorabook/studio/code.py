"""The studio's settings as text that generates the same images elsewhere."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pprint import pformat

from diffusers import DiffusionPipeline

from lorabook.live.generate import (
    is_plain,
    prompt_arguments,
    takes_embeddings,
    words_of,
)
from lorabook.live.inject import source_of
from lorabook.live.layers import layers_of, models_of
from lorabook.live.presets import to_block_weights
from lorabook.live.scales import layer_scales
from lorabook.pipelines import find_model
from lorabook.schedulers import scheduler_name, scheduler_named, scheduler_options, usual_name
from lorabook.studio.generate import read_prompts, side_of, size_of
from lorabook.studio.settings import StudioSettings
from lorabook.worlds import DATA, bundled

_UNWEIGHTED = (
    "# diffusers draws these words without A1111's weights and BREAK, and the first 75 tokens of "
    "them; lb.generate draws them as the studio does"
)
_CAPITALISED = ("euler", "heun", "karras", "exponential", "beta", "uniform", "simple")


def as_code(settings: StudioSettings, dialect: str, pipe: DiffusionPipeline) -> str:
    """Settings as code or as a prompt.

    Args:
        settings: What the code shows.
        dialect: One of `DIALECTS`. "lorabook" and "diffusers" run as they are; "a1111" is a prompt
            for each seed. What a dialect cannot say stands in it as a comment; where a prompt
            cannot be read, nothing was generated, and the comment says why.
        pipe: The pipeline with the adapters.

    Raises:
        ValueError: For another dialect.
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
    off = [name for name, adapter in settings.adapters.items() if not adapter.on]
    adapters = {name: one for name, one in settings.adapters.items() if name not in off}
    return DIALECTS[dialect](settings.with_(adapters=adapters), pipe) + "\n"


def _lorabook_code(settings: StudioSettings, pipe: DiffusionPipeline) -> str:
    scheduler = f", scheduler={settings.scheduler!r}" if settings.scheduler else ""
    lines = ["import torch", "", "import lorabook as lb", ""]
    lines.append(f"pipe = lb.load_pipeline({_model(pipe)!r}{scheduler})")
    for name, adapter in settings.adapters.items():
        source, comments = _source(pipe, name)
        lines += comments
        if adapter.rank:
            smaller = f"{name}_rank_{adapter.rank}"
            lines.append(f"lb.resize_adapter({source!r}, {smaller!r}, rank={adapter.rank})")
            source = smaller
        lines.append(f"lb.load_adapter(pipe, {source!r}, {name!r})")
    scales = _pretty({n: one.scales(layers_of(pipe, n)) for n, one in settings.adapters.items()})
    if settings.adapters and _is_blend(settings):
        method = f'method={settings.blend_method!r}, new_name="blended", across_bases=True'
        lines.append(f"lb.blend(pipe, {scales}, {method})")
    elif settings.adapters:
        lines.append(f"lb.set_scales(pipe, {scales})")
    return "\n".join(
        [
            *lines,
            _call(settings, pipe, _has_plain_prompts(settings, pipe)),
            "lb.ImageGrid([images])",
        ]
    )


def _diffusers_code(settings: StudioSettings, pipe: DiffusionPipeline) -> str:
    dtype = next(iter(models_of(pipe).values())).dtype
    half = f", torch_dtype={dtype}" if str(dtype) != "torch.float32" else ""
    device = f".to({pipe.device.type!r})" if pipe.device.type != "cpu" else ""
    model = f"AutoPipelineForText2Image.from_pretrained({find_model(_model(pipe))!r}{half}){device}"
    kind, options = None, {}
    if settings.scheduler:
        kind, options = scheduler_options(pipe.scheduler.config, settings.scheduler)
    names = f"AutoPipelineForText2Image, {kind.__name__}" if kind else "AutoPipelineForText2Image"
    lines = ["import torch", f"from diffusers import {names}", "", f"pipe = {model}"]
    if kind:
        usual, config = inspect.signature(kind).parameters, pipe.scheduler.config
        more = "".join(
            f", {option}={value!r}"
            for option, value in options.items()
            if config.get(option, usual[option].default) != value
        )
        lines.append(f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config{more})")
    single = []
    for name, adapter in settings.adapters.items():
        source, comments = _source(pipe, name)
        if "://" in source:
            reason = "diffusers fetches no web address; download the file and give its path"
            comments.append(f"# {name}: {reason}")
        if adapter.rank:
            reason = f"this is not cut to rank {adapter.rank}; lb.resize_adapter does that"
            comments.append(f"# {name}: {reason}")
        lines += comments
        path = bundled(f"adapters/{source}") or Path(source).expanduser()
        arguments = [str(path) if path.is_dir() else source]
        if path.is_file() or source.endswith(".safetensors") and "://" not in source:
            arguments = [str(path.parent), path.name]
        arguments = ", weight_name=".join(map(repr, arguments))
        lines.append(f"pipe.load_lora_weights({arguments}, adapter_name={name!r})")
        scales = layer_scales(pipe, name, adapter.scales(models_of(pipe)))
        for component, layers in scales.items():
            if modules := _by_module(layers, adapter.scale):
                single += [
                    f"for module, scale in {_pretty(modules)}.items():",
                    f"    for layer in pipe.{component}.get_submodule(module).modules():",
                    f"        if {name!r} in getattr(layer, 'scaling', {{}}):",
                    f"            layer.set_scale({name!r}, scale)",
                ]
    if _is_blend(settings):
        method = settings.blend_method
        lines.append(f"# diffusers adds adapters up; {method!r} is a method of lb.blend")
    if settings.adapters:
        numbers = [adapter.scale for adapter in settings.adapters.values()]
        lines += [f"pipe.set_adapters({list(settings.adapters)!r}, {numbers!r})", *single]
    if not _has_plain_prompts(settings, pipe):
        lines.append(_UNWEIGHTED)
        words = {name: words_of(getattr(settings, name)) for name in ("prompt", "negative_prompt")}
        settings = settings.with_(**words)
    return "\n".join([*lines, _call(settings, pipe, True)])


def _a1111_prompt(settings: StudioSettings, pipe: DiffusionPipeline) -> str:
    words, cannot = [settings.prompt], []
    for name, adapter in settings.adapters.items():
        weights, comments = "", _source(pipe, name, "kohya")[1]
        if adapter.blocks or adapter.parts:
            scales = layer_scales(pipe, name, replace(adapter, scale=1.0).scales(models_of(pipe)))
            for count in (12, 20) if "text_encoder_2" in models_of(pipe) else (17, 26):
                try:
                    numbers = to_block_weights(scales, count)
                except ValueError as error:
                    reason = str(error)
                else:
                    weights = ":lbw=" + ",".join(f"{number:g}" for number in numbers)
                    break
            comments += [] if weights else [f"# {name}: {reason}"]
        if adapter.rank:
            comments.append(f"# {name} is cut to rank {adapter.rank}, which needs its own file")
        words.append(f"<lora:{name}:{adapter.scale:g}{weights}>")
        cannot += comments
    if _is_blend(settings):
        method = settings.blend_method
        cannot.append(f"# A1111 adds adapters up and does not blend them by {method!r}")
    lines = [" ".join(words)]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    name = usual_name(settings.scheduler) or settings.scheduler if settings.scheduler else None
    name = name or scheduler_name(pipe.scheduler) or type(pipe.scheduler).__name__
    spelled = {"unipc": "UniPC", "a": "a"} | {word: word.title() for word in _CAPITALISED}
    is_class = name.endswith("Scheduler")
    sampler = name if is_class else " ".join(spelled.get(w, w.upper()) for w in name.split())
    size = f"{settings.width or side_of(pipe)}x{settings.height or side_of(pipe)}"
    call = (
        f"Steps: {settings.num_inference_steps}, Sampler: {sampler}, "
        f"CFG scale: {settings.guidance_scale:g}, Seed: {{seed}}, Size: {size}"
    )
    texts = ["\n".join([*lines, call.format(seed=seed)]) for seed in settings.seeds]
    return "\n".join(["\n\n".join(texts), *cannot])


DIALECTS = {"lorabook": _lorabook_code, "diffusers": _diffusers_code, "a1111": _a1111_prompt}


def _by_module(scales: Mapping[str, float], usual: float) -> dict[str, float]:
    """Scales by the outermost modules that have one scale throughout, without those at `usual`.

    Args:
        scales: Of each layer of a model.
        usual: What all layers have already.
    """
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


def _is_blend(settings: StudioSettings) -> bool:
    return settings.blend_method not in (None, "cat")


def _pretty(scales: object) -> str:
    return pformat(scales, sort_dicts=False, width=110)


def _model(pipe: DiffusionPipeline) -> str:
    """The Hub id, folder or bundled name that the pipeline was loaded from."""
    name = pipe.config.get("_name_or_path") or ""
    path = Path(name).resolve()
    return path.relative_to(DATA).as_posix() if name and path.is_relative_to(DATA) else name


def _source(pipe: DiffusionPipeline, name: str, form: str = "diffusers") -> tuple[str, list[str]]:
    """Where an adapter is; for one in memory only, a file for it and how to write that."""
    if source := source_of(pipe, name):
        return source, []
    file = f"{name}.safetensors"
    write = f"lb.save_adapter(pipe, {file!r}, {form!r}, name={name!r})"
    comment = f"# {name} is in memory only; write it first, where the studio is: {write}"
    return file, [comment]
