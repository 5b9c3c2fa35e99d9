import shutil

import pytest
import torch
from safetensors.torch import load_file

import lorabook as lb
from conftest import quick_config, quick_train
from lorabook.training.checkpoints import STATE, find_checkpoint, save_checkpoint
from lorabook.training.validation import ValidationImages


def saved(folder, step, identity=None, limit=None, **state):
    state = {
        "step": step,
        "history": [{"step": step, "loss": 0.5}],
        "weights": {"a": torch.full((2,), float(step))},
        "identity": identity or {"rank": 4},
        **state,
    }
    save_checkpoint(folder, state, _adapter, limit)
    return folder / f"checkpoint-{step}"


def _adapter(target):
    (target / "pytorch_lora_weights.safetensors").write_text("weights")


def found(folder, wanted="latest", **identity):
    return find_checkpoint(folder, wanted, identity or {"rank": 4})


def test_latest_is_the_newest_by_number(tmp_path):
    for step in (9, 10, 2):
        saved(tmp_path, step)
    state = found(tmp_path)
    assert (state["step"], state["history"]) == (10, [{"step": 10, "loss": 0.5}])
    assert state["weights"]["a"].tolist() == [10, 10]


def test_latest_starts_afresh_where_there_is_none(tmp_path):
    assert found(tmp_path) == found(tmp_path / "nowhere") == {}


def test_one_is_found_by_its_name_or_its_path(tmp_path):
    path = saved(tmp_path, 4)
    saved(tmp_path, 5)
    assert found(tmp_path, "checkpoint-4")["step"] == found(tmp_path, str(path))["step"] == 4


def test_one_that_is_not_there_is_an_error_that_lists_what_is(tmp_path):
    saved(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="no folder 'checkpoint-7'.*has checkpoint-4"):
        found(tmp_path, "checkpoint-7")


def changed(content):
    """One bit of the weights is another."""
    place = content.index(torch.full((2,), 8.0).numpy().tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], changed, lambda content: None]
)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, damage):
    saved(tmp_path, 4)
    path = saved(tmp_path, 8) / STATE
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint-8 is damaged.*one before"):
        assert found(tmp_path)["step"] == 4


def test_a_damaged_one_asked_for_by_name_is_an_error(tmp_path):
    (saved(tmp_path, 8) / STATE).write_text("")
    with pytest.raises(ValueError, match="checkpoint-8 is damaged"):
        found(tmp_path, "checkpoint-8")


def test_another_runs_is_an_error_that_says_what_differs(tmp_path):
    saved(tmp_path, 4)
    with pytest.raises(ValueError, match="belongs to another run: rank is 4 there and 8 here"):
        found(tmp_path, rank=8)


def test_latest_passes_over_another_runs_where_there_is_one_of_this(tmp_path):
    saved(tmp_path, 4)
    saved(tmp_path, 8, {"rank": 2})
    assert found(tmp_path)["step"] == 4


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        saved(tmp_path, step, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_one_that_could_not_be_written_leaves_no_trace(tmp_path):
    saved(tmp_path, 1)

    def full(target):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, {"step": 2, "history": []}, full, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Prodigy"])
def test_an_optimiser_goes_on_to_the_same_bits(kind, tmp_path):
    prodigy = pytest.importorskip("prodigyopt").Prodigy

    def make():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3))
        optimizer = {
            "AdamW": lambda: torch.optim.AdamW([weight], 0.1, fused=True),
            "Prodigy": lambda: prodigy([weight]),
            "SGD": lambda: torch.optim.SGD([weight], 0.1, momentum=0.9),
        }[kind]()
        return (
            weight,
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        )

    def steps(weight, optimizer, schedule, numbers):
        for number in numbers:
            weight.grad = torch.full_like(weight, 0.1 * number + 0.05)
            optimizer.step()
            schedule.step()

    weight, optimizer, schedule = make()
    steps(weight, optimizer, schedule, range(3))
    optimizers = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    saved(tmp_path, 3, weights=weight.detach(), **optimizers)
    steps(weight, optimizer, schedule, range(3, 6))
    other, optimizer, schedule = make()
    state = found(tmp_path)
    other.data.copy_(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    steps(other, optimizer, schedule, range(3, 6))
    assert torch.equal(weight, other)


def test_a_run_that_goes_on_ends_in_the_same_weights_and_losses(tmp_path):
    told = dict(
        max_train_steps=6,
        checkpointing_steps=2,
        lr_scheduler="cosine",
        lr_warmup_steps=1,
        lora_dropout=0.1,
        random_flip=True,
        gradient_accumulation_steps=2,
        validation_split=0.34,
    )
    whole = quick_train(tmp_path / "a", **told)
    shutil.copytree(tmp_path / "a/checkpoint-2", tmp_path / "b/checkpoint-2")
    rest = quick_train(tmp_path / "b", resume_from_checkpoint="latest", **told)
    first, second = load_file(whole.adapter), load_file(rest.adapter)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert rest.losses == whole.losses and rest.validation_losses == whole.validation_losses


def test_a_checkpoints_adapter_can_be_used_at_once(tmp_path, pipe):
    quick_train(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    assert lb.load_adapter(pipe, tmp_path / "checkpoint-2").rank == 2


def test_after_the_last_step_latest_is_at_its_end(tmp_path):
    first = quick_train(tmp_path)
    again = quick_train(tmp_path, resume_from_checkpoint="latest")
    assert again.losses == first.losses and again.finished


def test_a_run_can_be_made_longer(tmp_path):
    quick_train(tmp_path)
    longer = quick_config(
        output_dir=str(tmp_path), resume_from_checkpoint="latest", max_train_steps=5
    )
    assert len(lb.train_text_to_image(longer).losses) == 5


def test_other_settings_do_not_go_on_with_a_run(tmp_path):
    quick_train(tmp_path)
    with pytest.raises(
        ValueError, match="another run: rank is 2 there and 4 here; give the same settings"
    ):
        quick_train(tmp_path, rank=4, resume_from_checkpoint="latest")


def test_going_on_with_other_steps_under_a_schedule_that_counts_them_says_so(tmp_path):
    told = dict(
        output_dir=str(tmp_path), lr_scheduler="cosine", lr_warmup_steps=0, checkpointing_steps=1
    )
    lb.train_text_to_image(quick_config(max_train_steps=1, **told))
    with pytest.warns(UserWarning, match="had 1 steps and now has 2.*cosine schedule"):
        lb.train_text_to_image(
            quick_config(max_train_steps=2, resume_from_checkpoint="latest", **told)
        )


def test_a_fresh_run_puts_the_pictures_of_an_earlier_one_aside(tmp_path):
    (tmp_path / "validation").mkdir()
    config = quick_config(output_dir=str(tmp_path), validation_prompt="a cat")
    for number in (1, 2):
        (tmp_path / "validation/step-000005_seed-0.png").write_text(str(number))
        ValidationImages(config, None, 0)
        assert (
            tmp_path / f"validation/earlier-{number}/step-000005_seed-0.png"
        ).read_text() == str(number)
    assert not list((tmp_path / "validation").glob("*.png"))
