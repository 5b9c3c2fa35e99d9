import copy
import os
import random
import signal
import warnings

import huggingface_hub
import pytest
import torch
from PIL import Image

import lorabook as lb
from loopback_hub import LoopbackHub
from styles import creature

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's jobs in the background inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """The longest first, so that it does not keep one worker when the other has nothing left to do."""
    items.sort(key=lambda item: item.path.name not in ("test_stock_images.py", "test_offline.py"))


@pytest.fixture(scope="session")
def pristine():
    """The bundled pipeline as it is loaded, without progress bars; nothing may change it."""
    pipe = lb.load_pipeline("tiny-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(pristine):
    """A bundled pipeline of its own, copied in a third of the time that loading takes."""
    return copy.deepcopy(pristine)


@pytest.fixture
def small(pipe):
    """The bundled pipeline with a random UNet of two blocks, which is quick to compile, and an
    adapter "random".
    """
    from diffusers import UNet2DConditionModel

    from adapter_files import add_random

    torch.manual_seed(0)
    pipe.register_modules(
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )
    add_random(pipe, text=False)
    return pipe


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for this process, with a cache of its own."""
    with LoopbackHub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,  # the loopback hub speaks LFS only
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield hub


@pytest.fixture
def creature_folder(tmp_path):
    """Six creatures with metadata.jsonl."""
    folder = tmp_path / "creatures"
    folder.mkdir()
    rng = random.Random(0)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for number in range(6):
            image, text = creature(rng)
            image.save(folder / f"{number}.png")
            metadata.write(f'{{"file_name": "{number}.png", "text": "{text}"}}\n')
    return folder


@pytest.fixture
def picture():
    """Makes small pictures of one colour."""
    return lambda color="red", size=(8, 8), mode="RGB": Image.new("RGB", size, color).convert(mode)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """A LoRA trained for three steps on six creatures, for tests of what comes after training."""
    folder = tmp_path_factory.mktemp("quick") / "quick"
    return lb.train_text_to_image(quick_config(output_dir=str(folder)))


@pytest.fixture
def page():
    """A page of headless Chromium, 1280 by 900."""
    from playwright.sync_api import sync_playwright
    from servers import chromium

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        made = browser.new_page(viewport={"width": 1280, "height": 900})
        made.set_default_timeout(60_000)
        yield made
        browser.close()


def tiny_sdxl(folder) -> str:
    """A random pipeline of SDXL's topology and tiny width, saved in a folder; tokenizer and VAE are
    tiny-sd's.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    base = lb.load_pipeline("tiny-sd", device="cpu")
    text = CLIPTextConfig(
        vocab_size=base.tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=base.text_encoder.config.bos_token_id,
        eos_token_id=base.text_encoder.config.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    pipe = StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder / "tiny-sdxl")
    return str(folder / "tiny-sdxl")


def quick_config(**changes) -> "lb.TextToImageConfig":
    """A config of a run that ends within seconds."""
    told = dict(
        pretrained_model_name_or_path="tiny-sd",
        dataset_name="creatures",
        max_train_samples=6,
        seed=0,
        train_batch_size=2,
        max_train_steps=3,
        learning_rate=1e-3,
        rank=2,
        report_to="none",
    )
    return lb.TextToImageConfig(**told | changes)


def quick_dreambooth(**changes) -> "lb.DreamBoothConfig":
    """A config of a DreamBooth run that ends within seconds."""
    told = dict(
        pretrained_model_name_or_path="tiny-sd",
        instance_data_dir="subjects/patch_cat",
        seed=0,
        rank=2,
        instance_prompt="a drawing of sks cat",
        train_batch_size=2,
        max_train_steps=3,
        report_to="none",
    )
    return lb.DreamBoothConfig(**told | changes)


def quick_train(folder, **changes) -> "lb.TrainingRun":
    """A text-to-image run into a folder."""
    return lb.train_text_to_image(quick_config(output_dir=str(folder), **changes))


def quick_train_dreambooth(folder, **changes) -> "lb.TrainingRun":
    """A DreamBooth run into a folder."""
    return lb.train_dreambooth(quick_dreambooth(output_dir=str(folder), **changes))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Encoded images and prompts of the tests are kept apart from the user's."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


@pytest.fixture
def silent():
    """Let no warning pass unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
