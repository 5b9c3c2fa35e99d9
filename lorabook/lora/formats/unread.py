"""What stands in an adapter's file beside the weights that are read: named, refused where it would change the picture."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lorabook.lora.formats.keys import names_a_layer

READ = "LoRA, LoCon, LoHa, LoKr, DoRA and whole differences"
_KINDS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.(w_norm|b_norm)$", "trained norms"),
        (r"\.diff_b$", "differences of biases"),
        (r"\.diff$", "differences of norms and embeddings"),
        (r"\.set_weight$", "replaced weights"),
        (r"\.b?oft_\w+(\.[\w-]+)*$", "OFT"),
        (r"\.(on_input|ia3_l)\b", "IA³"),
        (r"\.[ab][12]\.weight$", "GLoRA"),
        (r"\.lora_embedding_[AB]\b", "LoRA of embeddings"),
        (r"\.bias$|\.lora_bias\b", "biases"),
        (r"\.vera_\w+|\.hra_u\b|\.c3a_\w+|\.lora_XS\b", "a rarer kind of PEFT's"),
    )
]
_EMBEDDING = re.compile(
    r"bundle_emb\.(?P<name>.+?)\.(?P<part>(?:clip_[glh]|t5\w*)(?:_out)?|string_to_param\.[^.]+"
    r"|emb_params|[^.]+)$"
)


def passed_over(
    weights: Mapping[str, Tensor], ignored: Iterable[str], where: str
) -> tuple[str, ...]:
    """Why keys that are not read change nothing, a sentence each.

    Args:
        weights: of the whole file.
        ignored: those keys of it that are no weights of a layer that could be read.
        where: what to call the file in errors.
    Raises: ValueError where one of them would change the picture.
    """
    ignored = [key for key in ignored if not _EMBEDDING.match(key)]
    ours = [key for key in ignored if names_a_layer(key)]
    ia3 = any(key.endswith(".on_input") for key in ours)
    if strange := [key for key in ours if _changes_something(key, weights[key])]:
        examples = {_kind(key, ia3): key for key in reversed(strange)}
        named = " and ".join(
            f"{key:.100} ({kind})" if kind else f"{key:.100}"
            for kind, key in list(examples.items())[:2]
        )
        raise ValueError(
            f"{where} has {len(strange)} weights of a kind that is not read here, for example {named}; what is "
            f"read is {READ}"
        )
    others = [key for key in ignored if not names_a_layer(key)]
    kinds = ", ".join(dict.fromkeys(filter(None, (_kind(key, ia3) for key in ours))))
    return (
        *(
            f"{len(ours)} weights are zero, so that they change nothing ({kinds or 'of no kind that is read'})"
            for _ in ours[:1]
        ),
        *(f"{len(others)} keys name no layer, for example {key:.100}" for key in others[:1]),
    )


def embedding_notes(ignored: Iterable[str], path: Path | None) -> tuple[str, ...]:
    """What to say of the textual inversions in an adapter's file, with the calls that load them; nothing where none are.

    Args:
        ignored: the file's keys that are of no layer.
        path: the file; None for weights in memory.
    Source: the keys of lycoris/tools in KohakuBlueleaf/LyCORIS, as OneTrainer and A1111's Lora extension have them.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(ignored, reverse=True):  # clip_l before clip_g
        if told := _EMBEDDING.match(key):
            found.setdefault(told["name"], []).append((told["part"], key))
    if not found:
        return ()
    calls = [
        f"pipe.load_textual_inversion(e[{key!r}], token={name!r}"
        + (
            ", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)"
            if part == "clip_g"
            else ")"
        )
        for name, parts in found.items()
        for part, key in parts
        if not part.endswith("_out") and part[:2] != "t5"
    ]
    beyond = [
        key
        for parts in found.values()
        for part, key in parts
        if part.endswith("_out") or part[:2] == "t5"
    ]
    read = "from safetensors.torch import load_file; "
    read = "e = the adapter's weights" if path is None else f"{read}e = load_file({str(path)!r})"
    return (
        f"the file holds an embedding (textual inversion) for {', '.join(map(repr, sorted(found)))}, which prompts need "
        f"and which is not loaded; load it with {read}; {'; '.join(calls)}"
        + f" ({', '.join(beyond)}: for OneTrainer alone)"
        * bool(beyond),
    )


def _kind(key: str, ia3: bool) -> str:
    found = next((name for pattern, name in _KINDS if pattern.search(key)), "")
    return found or ("IA³" if ia3 and key.endswith(".weight") else "")


def _changes_something(key: str, value: Tensor) -> bool:
    if key.endswith(".on_input"):  # says which side IA³'s weight is for
        return False
    return key.endswith(".set_weight") or bool(value.float().any())
