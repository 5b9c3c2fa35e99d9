import os
import shutil
import subprocess
import sys
import traceback
import types

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import lorabook as lb
from loopback_hub import OWNER, TOKEN, LoopbackHub
from lorabook.hub import find_token, model_card, open_repository, push_adapter
from lorabook.lora.formats.keys import WEIGHT_NAME
from lorabook.lora.formats.write import write_adapter

CREATURES = lb.bundled("adapters/creatures") / WEIGHT_NAME
PUSH_AND_LOAD = """
import lorabook as lb
from lorabook.hub import push_adapter
url = push_adapter("creatures", "mine")
pipe = lb.load_pipeline("tiny-sd", device="cpu")
print(url, lb.load_adapter(pipe, url.split("/", 3)[3], "mine"), sep="\\n")
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for this process, with its token in the environment."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path):
    """A finished training's folder: adapter, checkpoint, log and pictures."""
    folder = tmp_path / "run"
    for name in ("checkpoint-300", "validation"):
        (folder / name).mkdir(parents=True)
    write(
        folder,
        training={
            "validation_prompt": "a blue cat",
            "output_dir": "/home/me/run",
            "hub_token": "hf_x",
        },
    )
    (folder / "history.jsonl").write_text("{}")
    shutil.copy(CREATURES, folder / "checkpoint-300")
    for name in ("step-000100_seed-0", "step-000300_seed-0", "step-000300_seed-1"):
        Image.new("RGB", (8, 8)).save(folder / "validation" / f"{name}.png")
    return folder


def write(folder, base_model="runwayml/stable-diffusion-v1-5", value=1.0, width=4, **about):
    """Write a small adapter file."""
    weights = {"unet.attn2.to_k.lora_A.weight": torch.full((2, width), value)}
    return write_adapter(
        folder / WEIGHT_NAME,
        weights,
        about={"base_model": base_model} | about,
        config={"unet": {"r": 2, "lora_alpha": 4, "rank_pattern": {"mid": 1}}},
    )


def card_of(path, **told):
    return ModelCard(model_card(path, "someone/mine", **told))


def test_what_was_pushed_comes_back_and_loads(tmp_path):
    with LoopbackHub() as hub:
        told = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD],
            env=os.environ | told,
            capture_output=True,
            text=True,
        )
    assert not done.stderr
    url, name, form, *_ = done.stdout.splitlines()
    assert url == f"{hub.url}/{OWNER}/mine"
    assert name.split() == ["adapter", "mine"] and form.split()[0] == "format"
    assert hub.repos["someone/mine"][WEIGHT_NAME] == CREATURES.read_bytes()


def test_only_adapter_card_and_pictures_are_sent_in_one_commit(hub, folder):
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    push_adapter(folder, "someone/mine")
    assert set(hub.repos["someone/mine"]) == {
        WEIGHT_NAME,
        "README.md",
        "images/grid.png",
        "images/step-000300_seed-0.png",
        "images/step-000300_seed-1.png",
    }
    assert hub.messages == ["Upload LoRA adapter"]


def test_a_training_run_brings_its_grid_and_command(hub, folder, picture):
    run = types.SimpleNamespace(
        adapter=folder / WEIGHT_NAME, grid=lb.ImageGrid([[picture()]]), command="train --rank=2"
    )
    push_adapter(run, "mine")
    files = hub.repos[f"{OWNER}/mine"]
    assert (
        files["images/grid.png"].startswith(b"\x89PNG") and b"train --rank=2" in files["README.md"]
    )


def test_what_lies_beside_a_single_file_stays_here(hub, folder):
    push_adapter(folder / WEIGHT_NAME, "mine")
    assert set(hub.repos[f"{OWNER}/mine"]) == {WEIGHT_NAME, "README.md"}


def test_pushing_again_replaces_the_files(hub, folder):
    push_adapter(folder, "mine", private=True)
    assert hub.private
    path = write(folder, value=2.0)
    push_adapter(folder, "mine")
    assert hub.repos[f"{OWNER}/mine"][WEIGHT_NAME] == path.read_bytes()


def test_a_broken_adapter_is_an_error_before_anything_is_sent(hub, tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        push_adapter(write(tmp_path, value=float("nan")), "mine")
    assert not hub.requests


def test_the_front_matter_says_what_the_hub_needs(folder):
    path = write(folder, trigger_words=["a sks cat"], training={})
    data = card_of(
        path, licence="mit", prompts=["a red cat"], pictures={"images/a.png": "a blue cat"}
    ).data.to_dict()
    assert data == {
        "base_model": "runwayml/stable-diffusion-v1-5",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "mit",
        "inference": True,
        "instance_prompt": "a sks cat",
        "tags": [
            "text-to-image",
            "diffusers",
            "lora",
            "diffusers-training",
            "stable-diffusion",
            "template:sd-lora",
        ],
        "widget": [
            {"text": "a blue cat", "output": {"url": "images/a.png"}},
            {"text": "a red cat"},
        ],
    }


@pytest.mark.parametrize(
    "base, said", [("tiny-sd", "for tiny-sd, which comes"), ("/home/me/models/mine", "for mine.")]
)
def test_a_base_model_that_is_not_on_the_hub_is_only_named_in_the_text(tmp_path, base, said):
    card = card_of(write(tmp_path, base_model=base))
    assert (
        "base_model" not in card.data.to_dict() and said in card.text and "/home" not in card.text
    )


def test_an_adapter_with_wide_embeddings_is_tagged_xl(tmp_path):
    assert "stable-diffusion-xl" in card_of(write(tmp_path, width=2048)).data.tags


def test_the_card_says_how_to_use_it_and_how_it_was_trained(tmp_path):
    path = write(
        tmp_path,
        training={"learning_rate": 1e-3, "validation_prompt": "a | b"},
        trigger_words=["sks"],
    )
    text = card_of(path).text
    for part in (
        'load_lora_weights("someone/mine")',
        'lb.load_adapter(pipe, "someone/mine")',
        "| learning_rate | 0.001 |",
        "| rank, unet | 1, 2 |",
        "| alpha, unet | 4 |",
        r"| validation_prompt | a \| b |",
        "`sks`",
        'pipe("sks")',
    ):
        assert part in text


def test_metadata_from_elsewhere_is_no_obstacle(tmp_path):
    assert "someone/mine" in card_of(write(tmp_path, training="yes", trigger_words="sks")).text


def test_tokens_and_folders_of_this_machine_stay_out_of_the_card(tmp_path):
    path = write(
        tmp_path,
        training={"hub_token": "hf_a", "output_dir": "/home/me/run", "other": ["C:\\me\\x", 1]},
    )
    text = card_of(
        path,
        command="train --hub_token hf_b --TOKEN=hf_c --data '/home/me/my cats' --out=/home/me/run",
    ).text
    assert "hf_" not in text and "me/run" not in text and "token" not in text.lower()
    assert "train --data 'my cats' --out=run" in text and "| other | ['x', 1] |" in text


def test_the_token_is_in_no_request_body_and_no_output(hub, folder, capfd):
    push_adapter(folder, "mine")
    assert len(hub.requests) > 5 and not any(TOKEN.encode() in body for _, _, body in hub.requests)
    assert TOKEN not in "".join(capfd.readouterr())


def test_an_adapter_that_holds_the_token_is_not_sent(hub, tmp_path):
    with pytest.raises(ValueError, match="would hold the token") as caught:
        push_adapter(write(tmp_path, training={"hub_token": TOKEN}), "mine")
    assert TOKEN not in str(caught.value) and not hub.repos[f"{OWNER}/mine"]


def test_a_missing_token_is_an_error_before_any_request(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    for call in (lambda: open_repository("mine"), lambda: push_adapter(folder, "mine")):
        with pytest.raises(
            ValueError, match="no token for the Hub; set HF_TOKEN.*Kaggle.*hf auth login.*«write»"
        ):
            call()
    assert not hub.requests


def test_the_token_of_kaggle_is_found(hub, monkeypatch):
    client = types.SimpleNamespace(get_secret=lambda name: f"{name} of Kaggle\n")
    monkeypatch.setitem(
        sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=lambda: client)
    )
    assert find_token() == TOKEN and find_token(" given ") == "given"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert find_token() == "HF_TOKEN of Kaggle"
    monkeypatch.setattr(client, "get_secret", lambda name: 1 / 0)
    assert find_token() is None


def test_a_refused_token_is_told_in_one_sentence_that_does_not_quote_it(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        ValueError, match=r"mine: the Hub refused the token \(401\); set HF_TOKEN.*still in"
    ) as caught:
        push_adapter(folder, "mine")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
    assert "hf_wrong" not in "".join(traceback.format_exception(caught.value))


def test_a_token_that_may_only_read_is_refused_before_the_training(hub):
    open_repository("mine")
    hub.refusals = {"/preupload/": 403}
    with pytest.raises(ValueError, match=r"mine: the Hub refused the token \(403\)"):
        open_repository("mine")


def test_a_token_with_blanks_is_not_quoted(hub):
    with pytest.raises(ValueError, match="copy it anew") as caught:
        open_repository("mine", "hf_a\nhf_b")
    assert "hf_" not in str(caught.value)


def test_opening_a_repository_gives_its_full_id_each_time(hub):
    assert (
        open_repository("mine") == open_repository("mine", TOKEN, private=True) == f"{OWNER}/mine"
    )


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "-a", None, "a" * 500])
def test_a_malformed_id_is_an_error_before_any_request(hub, name):
    with pytest.raises(ValueError, match="cannot be a repository's id; give name or owner/name"):
        open_repository(name)
    assert not hub.requests


def test_a_hub_out_of_reach_is_a_connection_error(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="mine: the Hub cannot be reached.*still in"):
        push_adapter(folder, "mine")


@pytest.mark.parametrize(
    "path, status, kind",
    [
        ("/commit/", 500, ConnectionError),
        ("/commit/", 400, ValueError),
        ("/stored/", 400, ValueError),
    ],
)
def test_a_failed_push_leaves_what_is_here_as_it_was(hub, folder, path, status, kind):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.refusals = {path: status}
    with pytest.raises(
        kind, match=f"mine: the Hub answered {status}: .*the adapter is still in .*{WEIGHT_NAME}"
    ) as caught:
        push_adapter(folder, "mine")
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value)
    assert (
        before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        and not hub.repos[f"{OWNER}/mine"]
    )


def test_the_clients_own_time_limit_comes_back(hub):
    session = huggingface_hub.utils.get_session()
    before = session.timeout
    open_repository("mine")
    assert session.timeout == before
