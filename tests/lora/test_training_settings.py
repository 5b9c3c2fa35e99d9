import json

from lorabook.lora.metadata import shareable, training_in


def test_lorabooks_settings_are_told():
    told = training_in(
        {"training": json.dumps({"learning_rate": 2e-3, "rank": 16, "train_text_encoder": True})}
    )
    assert told == {"learning_rate": "0.002", "rank": "16", "train_text_encoder": "true"}


def test_kohyas_settings_are_told_by_plain_names():
    told = training_in(
        {
            "ss_learning_rate": "0.0001",
            "ss_network_dim": "32",
            "ss_num_train_images": "833",
            "ss_num_epochs": "10",
            "ss_unet_lr": "None",
            "ss_session_id": "123",
            "ss_tag_frequency": "{}",
        }
    )
    assert told == {"rank": "32", "images": "833", "epochs": "10", "learning rate": "0.0001"}


def test_tokens_and_folders_are_not_told():
    told = training_in(
        {
            "training": json.dumps(
                {
                    "hub_token": "hf_x",
                    "tracker": "token=abc",
                    "output_dir": "me/secret",
                    "nested": {"path": "/home/me/model"},
                    "pretrained_model_name_or_path": "/home/me/sd15",
                    "resume": "C:\\Users\\me\\last",
                    "list": ["~/me/a"],
                }
            )
        }
    )
    assert told == {
        "pretrained_model_name_or_path": "sd15",
        "resume": "last",
        "nested": '{"path": "model"}',
        "list": '["a"]',
    }


def test_hub_ids_stay_whole():
    assert (
        shareable("stable-diffusion-v1-5/stable-diffusion-v1-5")
        == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def test_long_settings_are_cut():
    value = training_in({"ss_network_args": "x" * 500})["network settings"]
    assert len(value) == 120 and value.endswith("…")


def test_what_is_no_table_of_settings_is_passed_over():
    assert (
        training_in({"training": "not JSON"})
        == training_in({"training": "[1]"})
        == training_in({})
        == {}
    )
