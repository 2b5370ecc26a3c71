"""DeepSpeed configurations: what is filled in, and what is refused in which words."""

import json
from pathlib import Path

import pytest

from retrofit.training.deepspeed_config import resolve

ROOT = Path(__file__).parents[2]
BATCHES = ("--training.per_device_train_batch_size=2", "--training.gradient_accumulation_steps=2")


def config(**fields):
    return {"zero_optimization": {"stage": 2}, **fields}


@pytest.fixture
def recipe(make_recipe, tmp_path):
    return lambda *overrides: make_recipe(tmp_path / "run", *overrides)


@pytest.fixture
def problems(recipe):
    """The lines of the refusal of a config, the file's name taken off."""

    def problems(fields, *overrides):
        with pytest.raises(ValueError) as caught:
            resolve(fields, "zero.json", recipe(*overrides), 2)
        lines = str(caught.value).splitlines()
        assert all(line.startswith("zero.json: ") for line in lines)
        return [line.removeprefix("zero.json: ") for line in lines]

    return problems


def test_auto_and_absent_fields_are_filled_in(recipe):
    autos = dict.fromkeys(
        (
            "gradient_clipping",
            "gradient_accumulation_steps",
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
        ),
        "auto",
    )
    given = config(bf16={"enabled": "auto"}, **autos)
    for fields in (given, config()):
        resolved = resolve(fields, "zero.json", recipe("--optimizer.max_grad_norm=0.5"), 4)
        assert resolved["gradient_clipping"] == 0.5 and resolved["gradient_accumulation_steps"] == 1
        assert resolved["train_micro_batch_size_per_gpu"] == 1 and resolved["train_batch_size"] == 4
        assert "auto" not in json.dumps(resolved) and "bf16" not in resolved
    assert given["gradient_clipping"] == "auto"  # the user's own is not touched
    assert resolve(config(), "zero.json", recipe("--optimizer.max_grad_norm=null"), 4)["gradient_clipping"] == 0.0


def test_numbers_that_agree_with_the_recipe_are_accepted(recipe):
    fields = config(
        gradient_clipping=1, gradient_accumulation_steps=1, train_micro_batch_size_per_gpu=2, train_batch_size=8
    )
    assert resolve(fields, "zero.json", recipe(*BATCHES), 2)["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("name", "what", "wrong", "why"),
    [
        ("gradient_accumulation_steps", "an integer", 4, "micro-batches follow training.max_tokens_per_device"),
        ("gradient_clipping", "a number", 0.5, "the recipe's optimizer.max_grad_norm is 1.0"),
        ("train_micro_batch_size_per_gpu", "an integer", 4, "the recipe's training.per_device_train_batch_size is 2"),
        ("train_batch_size", "an integer", 16, "the recipe's training.documents_per_step is 8"),
    ],
)
def test_a_text_and_a_contradiction_are_refused_naming_both_values(problems, name, what, wrong, why):
    (line,) = problems(config(**{name: "8"}), *BATCHES)
    assert line.startswith(f'{name}: expected {what}, found the text "8"')
    (line,) = problems(config(**{name: wrong}), *BATCHES)
    assert line.startswith(f"{name}: is {wrong}, but {why}") and line.endswith('write "auto"')
    for value in (True, None, [8]):
        (line,) = problems(config(**{name: value}), *BATCHES)
        assert line.startswith(f"{name}: expected {what}, found {json.dumps(value)}")


def test_a_clipping_that_the_recipe_does_not_ask_for_is_refused(problems):
    (line,) = problems(config(gradient_clipping=1.0), "--optimizer.max_grad_norm=null")
    assert "is 1.0, but the recipe's optimizer.max_grad_norm is null" in line


@pytest.mark.parametrize("stage", [0, 4, None, True, 2.5])
def test_stages_that_are_none_are_refused_with_the_way_out(problems, stage):
    (line,) = problems({"zero_optimization": {"stage": stage}})
    assert line.startswith(f"zero_optimization.stage: is {json.dumps(stage)}; use 1, 2 or 3, or launch/accelerate/ddp")


@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {}}, {"zero_optimization": 3}])
def test_a_config_without_a_stage_is_refused(problems, zero):
    (line,) = problems(zero)
    assert line.startswith("zero_optimization.stage: is null")


def test_a_stage_in_quotes_is_refused_as_a_text(problems):
    (line,) = problems({"zero_optimization": {"stage": "2"}})
    assert line.startswith('zero_optimization.stage: expected an integer, found the text "2"')


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "fp16", "torch_autocast"])
def test_deepspeeds_own_precision_is_refused(problems, name):
    for value in ({"enabled": True}, {"enabled": "true"}, True):
        (line,) = problems(config(**{name: value}))
        assert line.startswith(f"{name}: ") and "training.bf16" in line


def test_what_the_recipe_decides_or_nobody_tried_is_refused_all_at_once(problems):
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme"},
        "offload_param": {"device": "cpu"},
        "zero_hpz_partition_size": 8,
        "zero_quantized_weights": True,
    }
    lines = problems({"zero_optimization": zero, "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}})
    assert [line.partition(": ")[0] for line in lines] == [
        "optimizer",
        "scheduler",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_param",
        "zero_optimization.zero_hpz_partition_size",
        "zero_optimization.zero_quantized_weights",
    ]


def test_an_auto_that_nothing_decides_is_refused(recipe):
    with pytest.raises(ValueError, match='zero.json: wall_clock_breakdown: "auto" has no meaning'):
        resolve(config(wall_clock_breakdown="auto"), "zero.json", recipe(), 2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shipped_files_resolve(recipe, stage):
    shipped = json.loads((ROOT / f"launch/deepspeed/zero{stage}.json").read_text())
    resolved = resolve(shipped, "zero.json", recipe("--training.bf16=true", *BATCHES), 2)
    assert resolved["zero_optimization"]["stage"] == stage and "auto" not in json.dumps(resolved)
    assert resolved["zero_optimization"].get("memory_efficient_linear") is (False if stage == 3 else None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping: is not supported; remove it, or write gradient_clipping if"),
        ({"compression_training": {}}, "compression_training: is not supported; remove it"),
        ({"wandb": {"enabled": True}}, "wandb: the recipe decides this; remove it and use training.report_to"),
        ({"amp": {"enabled": True}}, "amp: retrofit autocasts"),
    ],
)
def test_what_deepspeed_would_ignore_or_do_beside_the_recipe_is_refused(problems, fields, expected):
    (line,) = problems(config(**fields))
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"cpu_offload": True}, "offloading is not supported"),
        ({"mics_shard_size": 8}, "is not supported"),
        ({"zero_quantized_nontrainable_weights": True}, "is not supported"),
        ({"reduce_bucket_size": "5e8"}, 'expected a number, true or false, found the text "5e8"'),
    ],
)
def test_settings_of_zero_that_are_texts_or_that_nobody_tried_are_refused(problems, setting, expected):
    (line,) = problems({"zero_optimization": {"stage": 3, **setting}})
    assert line.startswith(f"zero_optimization.{next(iter(setting))}: {expected}")


def test_compiled_blocks_are_refused_where_hooks_inside_them_gather_weights(problems, recipe):
    (line,) = problems({"zero_optimization": {"stage": 3}}, "--training.compile=true")
    assert line.startswith("zero_optimization.stage: 3 gathers weights") and "training.compile: false" in line
    resolve(config(), "zero.json", recipe("--training.compile=true"), 2)


def test_what_nobody_tried_may_stand_there_switched_off(recipe):
    off = {
        "cpu_offload": False,
        "mics_shard_size": -1,
        "offload_param": {"device": "none"},
        "reduce_bucket_size": "auto",
    }
    resolved = resolve({"zero_optimization": {"stage": 3, **off}}, "zero.json", recipe(), 2)
    assert "reduce_bucket_size" not in resolved["zero_optimization"]
