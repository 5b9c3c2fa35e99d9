"""The studio's settings as text that draws the same picture elsewhere."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pprint import pformat

from lorabook.live.generate import is_plain, prompt_arguments, takes_embeddings, words_of
from lorabook.live.inject import source_of
from lorabook.live.layers import layers_of, models_of
from lorabook.live.presets import to_block_weights
from lorabook.live.scales import layer_scales
from lorabook.pipelines import find_model
from lorabook.schedulers import scheduler_name, scheduler_named, usual_name
from lorabook.studio.diffusers_scales import as_diffusers
from lorabook.studio.generate import side_of, size_of
from lorabook.studio.prompt_encoding import read
from lorabook.studio.settings import AdapterSettings, StudioSettings
from lorabook.worlds import DATA, bundled

_SPELLED = {
    name: name.upper()
    for name in (
        "ddim",
        "ddpm",
        "pndm",
        "plms",
        "lms",
        "dpm2",
        "dpm++",
        "2m",
        "2s",
        "3m",
        "sde",
        "deis",
        "lcm",
        "sgm",
    )
}
_SPELLED |= {
    "euler": "Euler",
    "heun": "Heun",
    "unipc": "UniPC",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "uniform": "Uniform",
    "simple": "Simple",
}
DIALECTS = ("lorabook", "diffusers", "a1111")
_UNWEIGHTED = (
    "# diffusers draws these words without A1111's weights and BREAK, and the first 75 tokens of them; "
    "lb.generate draws them as the studio does"
)


def as_code(
    settings: StudioSettings,
    dialect: str,
    *,
    pipe,
    sources: Mapping[str, str | os.PathLike] | None = None,
) -> str:
    """Settings as code or as a prompt.

    Args:
        dialect: "lorabook" or "diffusers", which run as they are; "a1111", a prompt with `<lora:…>` for each adapter,
            block weights among it, and the line of parameters, for each seed. What a dialect cannot say stands in it as a
            comment; where a prompt cannot be read, nothing was drawn, and the comment says why.
        pipe: the pipeline with the adapters.
        sources: where each adapter came from; what is absent is where `load_adapter` took it from. One that was never in a
            file has a comment that says how to write it into one.
    Raises: ValueError for another dialect.
    """
    if dialect not in DIALECTS:
        raise ValueError(
            f"there is no code for {dialect!r:.60}; there is for: {', '.join(DIALECTS)}"
        )
    try:
        settings = _as_drawn(settings, pipe)
    except ValueError as error:
        return f"# {error}\n"
    sources = {
        name: os.fspath((sources or {}).get(name) or source_of(pipe, name) or "")
        for name in settings.adapters
    }
    write = {"lorabook": _lorabook, "diffusers": _diffusers, "a1111": _a1111}[dialect]
    return write(
        settings, {name: one for name, one in settings.adapters.items() if one.on}, sources, pipe
    )


def _lorabook(
    settings: StudioSettings,
    adapters: Mapping[str, AdapterSettings],
    sources: Mapping[str, str],
    pipe,
) -> str:
    scheduler = f", scheduler={settings.scheduler!r}" if settings.scheduler else ""
    lines = [
        "import torch",
        "",
        "import lorabook as lb",
        "",
        f"pipe = lb.load_pipeline({_model(pipe)!r}{scheduler})",
    ]
    for name, adapter in adapters.items():
        source, comments = _written(name, sources[name])
        lines += comments
        if adapter.rank:
            lines.append(
                f"lb.resize_adapter({source!r}, {f'{name}_rank_{adapter.rank}'!r}, rank={adapter.rank})"
            )
            source = f"{name}_rank_{adapter.rank}"
        lines.append(f"lb.load_adapter(pipe, {source!r}, {name!r})")
    scales = {name: adapter.scales(layers_of(pipe, name)) for name, adapter in adapters.items()}
    if settings.blend_method not in (None, "cat") and scales:
        lines.append(
            f'lb.blend(pipe, {_said(scales)}, method={settings.blend_method!r}, new_name="blended", '
            "across_bases=True)"
        )
    elif scales:
        lines.append(f"lb.set_scales(pipe, {_said(scales)})")
    drawn = _call(settings, pipe) if _is_plain(settings, pipe) else _generate(settings, pipe)
    return "\n".join([*lines, drawn, "lb.ImageGrid([images])"]) + "\n"


def _diffusers(
    settings: StudioSettings,
    adapters: Mapping[str, AdapterSettings],
    sources: Mapping[str, str],
    pipe,
) -> str:
    model = find_model(_model(pipe))
    kind, options = scheduler_named(settings.scheduler) if settings.scheduler else (None, {})
    dtype = next(iter(models_of(pipe).values())).dtype
    half = f", torch_dtype={dtype}" if str(dtype) != "torch.float32" else ""
    device = f".to({pipe.device.type!r})" if pipe.device.type != "cpu" else ""
    names = ", ".join(["AutoPipelineForText2Image", *([kind.__name__] if kind else [])])
    lines = [
        "import torch",
        f"from diffusers import {names}",
        "",
        f"pipe = AutoPipelineForText2Image.from_pretrained({model!r}{half}){device}",
    ]
    if kind:
        more = "".join(
            f", {name}={value!r}"
            for name, value in options.items()
            if pipe.scheduler.config.get(name, inspect.signature(kind).parameters[name].default)
            != value
        )
        lines.append(f"pipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config{more})")
    said = {
        name: as_diffusers(pipe, name, adapter.scales(models_of(pipe)))
        for name, adapter in adapters.items()
    }
    for name, adapter in adapters.items():
        source, comments = _written(name, sources[name])
        lines += comments
        lines += [
            f"# {name}: diffusers fetches no web address; download the file and give its path"
        ] * ("://" in source)
        folder, file = _file(source)
        weight_name = f", weight_name={file!r}" if file else ""
        lines.append(f"pipe.load_lora_weights({folder!r}{weight_name}, adapter_name={name!r})")
        lines += [f"# {name}: {said[name][1]}"] * bool(said[name][1])
        lines += [
            f"# {name}: this is not cut to rank {adapter.rank}; lb.resize_adapter does that"
        ] * bool(adapter.rank)
    if settings.blend_method not in (None, "cat"):
        lines.append(
            f"# diffusers adds adapters up; {settings.blend_method!r} is a method of lb.blend"
        )
    if adapters:
        lines.append(
            f"pipe.set_adapters({list(adapters)!r}, {_said([scales for scales, _ in said.values()])})"
        )
    if not _is_plain(settings, pipe):
        lines.append(_UNWEIGHTED)
        settings = settings.with_(
            prompt=words_of(settings.prompt), negative_prompt=words_of(settings.negative_prompt)
        )
    return "\n".join([*lines, _call(settings, pipe)]) + "\n"


def _a1111(
    settings: StudioSettings,
    adapters: Mapping[str, AdapterSettings],
    sources: Mapping[str, str],
    pipe,
) -> str:
    words, cannot = [settings.prompt], []
    for name, adapter in adapters.items():
        weights, why = _block_weights(pipe, name, adapter)
        words.append(f"<lora:{name}:{adapter.scale:g}{weights}>")
        cannot += [
            comment.removeprefix("# ") for comment in _written(name, sources[name], "kohya")[1]
        ]
        cannot += [why] * bool(why)
        cannot += [f"{name} is cut to rank {adapter.rank}, which needs a file of its own"] * bool(
            adapter.rank
        )
    if settings.blend_method not in (None, "cat"):
        cannot.append(
            f"A1111 adds adapters up and does not blend them by {settings.blend_method!r}"
        )
    size = f"{settings.width or side_of(pipe)}x{settings.height or side_of(pipe)}"
    head = [" ".join(words)] + [f"Negative prompt: {settings.negative_prompt}"] * bool(
        settings.negative_prompt
    )
    texts = [
        "\n".join(
            [
                *head,
                f"Steps: {settings.num_inference_steps}, Sampler: {_sampler(settings, pipe)}, "
                f"CFG scale: {settings.guidance_scale:g}, Seed: {seed}, Size: {size}",
            ]
        )
        for seed in settings.seeds
    ]
    return "\n\n".join(texts) + "\n" + "".join(f"# {why}\n" for why in cannot)


def _block_weights(pipe, name: str, adapter: AdapterSettings) -> tuple[str, str]:
    """The `:lbw=` of an adapter, and why it cannot be said."""
    if not adapter.blocks and not adapter.parts:
        return "", ""
    factors = layer_scales(pipe, name, replace(adapter, scale=1.0).scales(models_of(pipe)))
    why = ""
    for count in (12, 20) if "text_encoder_2" in models_of(pipe) else (17, 26):
        try:
            return ":lbw=" + ",".join(
                f"{number:g}" for number in to_block_weights(factors, count)
            ), ""
        except ValueError as error:
            why = f"{name}: {error}"
    return "", why


def _as_drawn(settings: StudioSettings, pipe) -> StudioSettings:
    """The settings with the prompts that the pipeline was told. Raises ValueError where they cannot be drawn."""
    if settings.scheduler:
        scheduler_named(settings.scheduler)
    prompt, negative = read(settings.prompt, settings.negative_prompt)
    if takes_embeddings(pipe, {}):
        return settings
    told = prompt_arguments(pipe, prompt, negative, {})
    return settings.with_(prompt=told["prompt"], negative_prompt=told["negative_prompt"] or "")


def _is_plain(settings: StudioSettings, pipe) -> bool:
    """Whether the pipeline itself draws the prompts as the studio does."""
    return (
        not takes_embeddings(pipe, {})
        or is_plain(pipe, settings.prompt)
        and is_plain(pipe, settings.negative_prompt)
    )


def _sampler(settings: StudioSettings, pipe) -> str:
    """A1111's name of what draws, or its class where that has none."""
    own = scheduler_name(pipe.scheduler) or type(pipe.scheduler).__name__
    name = usual_name(settings.scheduler) or settings.scheduler if settings.scheduler else own
    return " ".join(_SPELLED.get(word, word) for word in name.split(" "))


def _generate(settings: StudioSettings, pipe) -> str:
    told = {"negative_prompt": settings.negative_prompt, **size_of(pipe, settings)}
    more = "".join(f", {key}={value!r}" for key, value in told.items() if value)
    return (
        f"images = [lb.generate(pipe, {settings.prompt!r}{more},\n                      "
        f"num_inference_steps={settings.num_inference_steps}, guidance_scale={settings.guidance_scale:g}, seed=seed)"
        f".images[0]\n          for seed in {settings.seeds!r}]"
    )


def _call(settings: StudioSettings, pipe) -> str:
    told = {"negative_prompt": settings.negative_prompt, **size_of(pipe, settings)}
    more = "".join(f", {key}={value!r}" for key, value in told.items() if value)
    return (
        f"images = [pipe({settings.prompt!r}{more},\n               num_inference_steps={settings.num_inference_steps}, "
        f"guidance_scale={settings.guidance_scale:g},\n               "
        f'generator=torch.Generator("cpu").manual_seed(seed)).images[0] for seed in {settings.seeds!r}]'
    )


def _said(scales) -> str:
    return pformat(scales, sort_dicts=False, width=110)


def _model(pipe) -> str:
    """The Hub id, folder or bundled name that the pipeline was loaded from."""
    name = pipe.config.get("_name_or_path") or ""
    path = Path(name)
    return (
        path.resolve().relative_to(DATA).as_posix()
        if name and path.resolve().is_relative_to(DATA)
        else name
    )


def _written(name: str, source: str, form: str = "diffusers") -> tuple[str, list[str]]:
    """An adapter's source; for one that is in memory only, the file it may be written into, and a comment that says how."""
    if source:
        return source, []
    file = f"{name}.safetensors"
    return file, [
        f"# {name} is in memory only; write it first, where the studio is: "
        f"lb.save_adapter(pipe, {file!r}, {form!r}, name={name!r})"
    ]


def _file(source: str) -> tuple[str, str | None]:
    """Folder and file of an adapter, or Hub id and None, as diffusers wants them."""
    path = bundled(f"adapters/{source}") or Path(source).expanduser()
    if path.is_file() or source.endswith(".safetensors") and "://" not in source:
        return str(path.parent), path.name
    return (str(path), None) if path.is_dir() else (source, None)
