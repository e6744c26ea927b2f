"""What `concat prepare-data` says at its end: the configuration that fits what was prepared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from concat_cli.commands.data import BATCH, OWN, config_for, steps_for
from concat_cli.core.config_file import load_config
from concat_cli.core.data.class_split import class_split_names
from concat_cli.core.method import TASKS

CASES = [  # name, class split, task -> configuration
    ("coco", "coco_panoptic_119_14", "panoptic", "concat_coco_119_14"),
    ("coco", "all_seen", "panoptic", "concat_coco_to_ade20k"),
    ("coco-instances", "coco_instances_48_17", "instance", "concat_coco_instances_48_17"),
    ("coco-instances", "all_seen", "instance", "concat_coco_instances_65_15"),
    ("voc", "voc_15_5", "semantic", "concat_voc_15_5"),
    ("photos", "my_split", "semantic", "own"),
    ("photos", "all_seen", "panoptic", "own"),
    ("cityscapes", "all_seen", "panoptic", "concat_coco_119_14"),
]


def next_config(name: str, split: str, task: str) -> str:
    return config_for(
        cast(
            Any,
            SimpleNamespace(
                source=SimpleNamespace(name=name, tasks=(task,), single=name == "photos"),
                class_split=split,
            ),
        )
    )


@pytest.mark.parametrize(("name", "split", "task", "stem"), CASES)
def test_the_next_command_takes_a_fitting_configuration(
    name: str, split: str, task: str, stem: str
) -> None:
    assert next_config(name, split, task) == stem


def test_every_configuration_that_is_named_is_there_and_of_real_photos() -> None:
    for split in class_split_names():
        for task in TASKS:
            config = load_config(next_config("coco", split, task))
            assert config.clip.model != "tiny"


@pytest.mark.parametrize(
    ("images", "steps"), [(3, 500), (80, 500), (100, 700), (320, 2000), (4000, 20_000)]
)
def test_steps_fit_the_size_of_own_data(images: int, steps: int) -> None:
    assert steps_for(images) == steps
    assert load_config(OWN).optim.batch_size == BATCH
