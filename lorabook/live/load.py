"""Load an adapter of any form onto an ordinary diffusers pipeline."""

from collections.abc import Iterable

from lorabook.live.inject import put_on, remember_source
from lorabook.live.layers import COMPONENTS, adapter_names, models_of, module_name
from lorabook.live.locks import locked
from lorabook.live.match import fit
from lorabook.live.originals import fused_names
from lorabook.live.report import LoadReport, report_of
from lorabook.live.transformer_keys import by_diffusers_names
from lorabook.lora.adapter import Adapter
from lorabook.lora.source import Source, brief, read_source


@locked
def load_adapter(
    pipe,
    source,
    name: str | None = None,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    components: Iterable[str] | None = None,
    allow_pickle: bool = False,
    hotswap_rank: int | None = None,
) -> LoadReport:
    """Load an adapter onto a pipeline, at scale 1, beside those that are there.

    It may be a LoRA, LoCon, LoHa, LoKr or DoRA, by the keys of diffusers (now and before PEFT), PEFT, Kohya, A1111,
    LyCORIS, ComfyUI or OneTrainer (OMI), and for a transformer by those of its original code that diffusers itself converts.
    Whatever is no plain LoRA is put on as one with the same ΔW, at the rank that needs.

    Args:
        pipe: a diffusers pipeline that can carry LoRA.
        source: a file, a folder (PEFT's too), a bundled name ("creatures"), a Hub id, an https address, a TrainingRun, or
            weights by key.
        name: the adapter's name; None takes the file's or folder's, with dots replaced (see `module_name`).
        weight_name, subfolder, revision, token, cache_dir, local_files_only: as in `from_pretrained`; for an address the
            token is its site's.
        components: which of "unet", "transformer", "text_encoder", "text_encoder_2" to take; None takes all the file has.
        allow_pickle: read an old .bin, .pt or .ckpt with `torch.load(weights_only=True)`.
        hotswap_rank: the largest rank that `swap_adapter` will bring; prepares a model to be compiled once.
    Returns: a LoadReport, which shows itself.
    Raises: FileNotFoundError if there is no such adapter; ValueError for a pickle file, a damaged one, weights that
        are not finite, a name in use, or an adapter made for another architecture. The pipeline is then as before.
    """
    found = read_for(
        pipe,
        source,
        allow_pickle=allow_pickle,
        weight_name=weight_name,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if name is not None and not isinstance(name, str):
        raise ValueError(f"an adapter's name is a text, not {name!r:.80}")
    name = module_name(name or found.name)
    if name in (*adapter_names(pipe), *fused_names(models_of(pipe))):
        raise ValueError(
            f"the pipeline has an adapter {name!r} already; give this one another name"
        )
    where = brief(found.path or f"adapter {name!r}")
    adapter = chosen(found.adapter, components, where)
    ready = fit(pipe, adapter, where)
    if hotswap_rank is not None:
        _check_room(ready, hotswap_rank)
    put_on(pipe, name, ready, adapter, hotswap_rank)
    remember_source(pipe, name, source)
    return report(pipe, name, found, adapter)


def report(pipe, name: str, found: Source, adapter: Adapter) -> LoadReport:
    """What was loaded, from what was read and what arrived."""
    left = [
        key
        for part in found.adapter.layers.keys() - adapter.layers.keys()
        for key in found.adapter.layers[part]
    ]
    return report_of(pipe, name, found, adapter, left)


def read_for(pipe, source, **find) -> Source:
    """An adapter from anywhere, by the names that layers have on a pipeline; arguments as in `read_source`."""
    found = read_source(source, layers_per_block=_layers_per_block(pipe), **find)
    return found._replace(adapter=by_diffusers_names(pipe, found.adapter))


def _layers_per_block(pipe) -> int:
    """Of a pipeline's UNet; 2 where it says nothing."""
    number = getattr(getattr(getattr(pipe, "unet", None), "config", None), "layers_per_block", 2)
    return number if isinstance(number, int) else 2


def chosen(adapter: Adapter, components: Iterable[str] | None, where: str) -> Adapter:
    """The adapter with these components only. Raises ValueError for unknown ones, or where none is left."""
    if components is None:
        return adapter
    wanted = [components] if isinstance(components, str) else list(components)
    for part in wanted:
        if part not in COMPONENTS:
            raise ValueError(
                f"unknown component {part!r}; the components are: {', '.join(COMPONENTS)}"
            )
    if not set(wanted) & adapter.layers.keys():
        raise ValueError(
            f"{where} has nothing for {', '.join(wanted)}; it has: {', '.join(adapter.layers)}"
        )
    return adapter.only(wanted)


def _check_room(ready, rank: int) -> None:
    most = max(made.rank for layers in ready.values() for made in layers.values())
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < most:
        raise ValueError(
            f"hotswap_rank must be a whole number of at least {most}, this adapter's rank; not {rank!r}"
        )
