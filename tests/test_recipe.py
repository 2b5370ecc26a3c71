"""Recipes: what is read, what is refused and in which words, and that a written recipe is read back equal."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retrofit.recipe import Recipe, describe_fields, dump_recipe, load_recipe
from retrofit.sections import LoraSection, SamplingSection

MINIMAL = """\
model:
  init_from: llada
data:
  path: store
objective:
  name: flexmdm
  window: 64
optimizer:
  learning_rate: 1e-4
training:
  output_dir: run
  max_steps: 100
  documents_per_step: 8
  save_steps: 50
"""
HUB_TOKEN = "hf_" + "aB3" * 11 + "x"  # 34 characters after the prefix, as the Hub's
TRACKER_KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def load(tmp_path):
    def load(text: str = MINIMAL, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return load


@pytest.fixture
def problems(load, tmp_path):
    """The lines of the refusal, without the directory."""

    def problems(text: str = MINIMAL, *overrides: str) -> list[str]:
        with pytest.raises(ValueError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return problems


def test_defaults_fill_what_is_left_out(load):
    recipe = load()
    assert recipe.lora is None and recipe.sampling == SamplingSection()
    assert recipe.optimizer.adam_beta2 == 0.999 and recipe.training.report_to == []


def test_scientific_notation_is_a_number(load):
    assert load().optimizer.learning_rate == 1e-4
    assert load(MINIMAL.replace("1e-4", "2E5")).optimizer.learning_rate == 2e5


def test_whole_float_is_an_integer(load):
    max_steps = load(MINIMAL.replace("max_steps: 100", "max_steps: 1e3")).training.max_steps
    assert max_steps == 1000 and type(max_steps) is int


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("max_steps: 100", 'max_steps: "8"', 'training.max_steps: expected an integer, found the text "8"'),
        ("max_steps: 100", "max_steps: 2.5", "training.max_steps: expected an integer, found the number 2.5"),
        ("max_steps: 100", "max_steps: true", "training.max_steps: expected an integer, found true"),
        ("max_steps: 100", "max_steps:", "training.max_steps: expected an integer, found nothing (null)"),
        (
            "max_steps: 100",
            "max_steps: 0",
            "training.max_steps: must be greater than or equal to 1, found the number 0",
        ),
        ("save_steps: 50", "save_steps: -1", "training.save_steps: must be greater than or equal to 1"),
        ("1e-4", "fast", 'optimizer.learning_rate: expected a number, found the text "fast"'),
        ("1e-4", "", "optimizer.learning_rate: expected a number, found nothing (null)"),
        ("1e-4", ".inf", "optimizer.learning_rate: expected a finite number, found the number inf"),
        ("1e-4", "[1]", "optimizer.learning_rate: expected a number, found a list"),
        ("path: store", "path: 7", "data.path: expected a text, found the number 7"),
        ("path: store", "path: ''", "data.path: must not be empty"),
        ("path: store", "path: {a: 1}", "data.path: expected a text, found a mapping"),
        ("name: flexmdm", "name: ar", "objective.name: expected 'flexmdm' or 'mdm', found the text \"ar\""),
    ],
)
def test_wrong_value_is_refused_with_line_field_and_what_was_expected(problems, old, new, expected):
    text = MINIMAL.replace(old, new)
    key = expected.partition(":")[0].partition(".")[2]
    line = next(number for number, row in enumerate(text.splitlines(), 1) if row.startswith(f"  {key}:"))
    (problem,) = problems(text)
    assert problem.startswith(f"recipe.yaml:{line}: {expected}")


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("warmup_ratio: 1.1", "optimizer.warmup_ratio"),
        ("adam_beta1: 1.0", "optimizer.adam_beta1"),
        ("weight_decay: -0.1", "optimizer.weight_decay"),
        ("max_grad_norm: 0", "optimizer.max_grad_norm"),
    ],
)
def test_value_out_of_range_is_refused(problems, line, field):
    (problem,) = problems(MINIMAL.replace("learning_rate: 1e-4", f"learning_rate: 1e-4\n  {line}"))
    assert problem.startswith(f"recipe.yaml:10: {field}: must be ")


def test_checkpointing_is_all_blocks_every_nth_or_selective(load, problems):
    for text, value in (("true", True), ("false", False), ("1", 1), ("4", 4), ("2e0", 2), ("selective", "selective")):
        found = load(MINIMAL, f"--training.gradient_checkpointing={text}").training.gradient_checkpointing
        assert found == value and type(found) is type(value)
    for text in ("0", "-1", "2.5", "all", "[2]"):
        (problem,) = problems(MINIMAL, f"--training.gradient_checkpointing={text}")
        assert problem.startswith("command line: training.gradient_checkpointing: expected true, false, a number of ")


def test_half_precision_attention_without_it_is_refused(load, problems):
    for name in ("varlen", "flash"):
        (problem,) = problems(MINIMAL, f"--training.attention={name}")
        assert f"attention: {name} computes in half precision; set bf16: true" in problem
        load(MINIMAL, f"--training.attention={name}", "--training.bf16=true")


def test_unknown_tracker_and_text_for_a_list_are_refused(problems):
    (problem,) = problems(MINIMAL + "  report_to: [tensorbord]\n")
    assert problem.startswith("recipe.yaml:15: training.report_to[0]: expected 'tensorboard', 'wandb' or 'trackio'")
    (problem,) = problems(MINIMAL + "  report_to: wandb\n")
    assert problem.endswith('expected a list, found the text "wandb"; write [wandb]')


def test_all_unknown_keys_are_reported_at_once_with_line_section_and_nearest(problems):
    text = (
        MINIMAL.replace("learning_rate: 1e-4", "learning_rate: 1e-4\n  learning_rat: 1e-4")
        + "  num-epochs: 3\n  weight_decay: 0.1\nmax_steps: 7\noptimiser:\n  learning_rate: 1\nlora:\n  r: 8\n"
    )
    found = problems(text)
    assert "recipe.yaml:10: unknown key learning_rat in section optimizer; nearest known key: learning_rate" in found
    assert any(
        row.startswith("recipe.yaml:16: unknown key num-epochs in section training; nearest known key: ")
        for row in found
    )
    assert (
        "recipe.yaml:17: unknown key weight_decay in section training; it is a key of section optimizer: move it there"
        in found
    )
    assert (
        "recipe.yaml:18: unknown section max_steps at top level; it is a key of section training: move it there"
        in found
    )
    assert "recipe.yaml:19: unknown section optimiser at top level; nearest known section: optimizer" in found
    assert "recipe.yaml:21: lora.lora_alpha is missing; the section needs it" in found
    assert "recipe.yaml:21: lora.target_modules is missing; the section needs it" in found
    assert len(found) == 7


def test_dashes_for_underscores_find_the_key(problems):
    (problem,) = problems(MINIMAL + "  save-total-limit: 2\n")
    assert (
        problem
        == "recipe.yaml:15: unknown key save-total-limit in section training; nearest known key: save_total_limit"
    )


def test_duplicate_keys_are_errors_with_both_lines(problems):
    assert problems(MINIMAL + "  max_steps: 7\n") == [
        "recipe.yaml:15: duplicate key max_steps in section training, first given in line 12; keep one"
    ]
    assert problems(MINIMAL + "data:\n  path: other\n") == [
        "recipe.yaml:15: duplicate key data in the recipe, first given in line 3; keep one"
    ]
    schedule = "init_from: llada\n  insertion_schedule: {type: power, type: linear}"
    (problem,) = problems(MINIMAL.replace("init_from: llada", schedule))
    assert problem.startswith('recipe.yaml:3: found duplicate key "type"')


def test_missing_section_names_what_it_needs(problems):
    (problem,) = problems(MINIMAL.replace("data:\n  path: store\n", ""))
    assert problem == "recipe.yaml: section data is missing; it needs path"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml: the recipe is empty; it needs the sections model, data, objective, optimizer, training"),
        ("- a\n", "recipe.yaml:1: expected sections"),
        ("model: [\n", "recipe.yaml:2: "),
        ("model:\n\tinit_from: a\n", "recipe.yaml:2: "),
        (MINIMAL.replace("data:\n  path: store", "data: store"), "recipe.yaml:3: data: expected a section with keys"),
        (MINIMAL.replace("store", "!!python/object:os.system store"), "recipe.yaml:4: "),
    ],
)
def test_broken_yaml_is_one_line_with_its_place(problems, text, expected):
    (problem,) = problems(text)
    assert problem.startswith(expected)


def test_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not a UTF-8 text file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(tmp_path / "recipe.yaml").model.init_from == "llada"


def test_overrides_replace_and_add_fields_in_both_spellings(load):
    lora = ("--lora.r", "8", "--lora.lora_alpha=16", "--lora.target_modules", "[q_proj, v_proj]")
    recipe = load(
        MINIMAL, "--optimizer.learning_rate", "3e-5", "--training.eval_steps=null", "--data.path", "2024", *lora
    )
    assert recipe.optimizer.learning_rate == 3e-5 and recipe.training.eval_steps is None and recipe.data.path == "2024"
    assert recipe.lora == LoraSection(r=8, lora_alpha=16.0, target_modules=["q_proj", "v_proj"])


def test_override_mends_what_the_file_has_wrong(load):
    assert load(MINIMAL.replace("1e-4", "fast"), "--optimizer.learning_rate", "1").optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["--training.max_step", "3"],
            "command line: unknown key max_step in section training; nearest known key: max_steps",
        ),
        (
            ["--trainer.max_steps", "3"],
            "command line: unknown section trainer at top level; nearest known section: training",
        ),
        (
            ["--max_steps", "3"],
            "command line: expected --section.field value, found --max_steps; write --training.max_steps",
        ),
        (["--training.max_steps"], "command line: --training.max_steps has no value"),
        (
            ["--training.max_steps", "many"],
            'command line: training.max_steps: expected an integer, found the text "many"',
        ),
        (["--training.seed=1", "--training.seed=2"], "command line: --training.seed is given twice; keep one"),
        (["--sampling.prompts", "[a"], "command line: --sampling.prompts: not a YAML value"),
    ],
)
def test_bad_override_is_refused(problems, overrides, expected):
    assert problems(MINIMAL, *overrides)[0].startswith(expected)


@pytest.mark.parametrize("token", [HUB_TOKEN, TRACKER_KEY, f"https://user:{HUB_TOKEN}@example.org/model"])
@pytest.mark.parametrize("where", ["init_from: llada", "path: store", "max_steps: 100", "learning_rate: 1e-4"])
def test_token_in_a_field_is_refused_and_masked(problems, token, where):
    found = problems(MINIMAL.replace(where, f"{where.split(':')[0]}: {token}"))
    assert len(found) == 1 and where.split(":")[0] in found[0]
    assert HUB_TOKEN not in found[0] and TRACKER_KEY not in found[0]


def test_token_in_a_list_or_an_override_is_refused_and_masked(problems):
    (problem,) = problems(MINIMAL, "--sampling.prompts", f"[{HUB_TOKEN}]")
    assert "sampling.prompts[0]: holds something shaped like an access token" in problem and HUB_TOKEN not in problem
    (problem,) = problems(MINIMAL, "--model.revision", HUB_TOKEN)
    assert HUB_TOKEN not in problem


def test_commit_is_a_revision_and_a_cache_path_is_no_token(load):
    assert load(MINIMAL, "--model.revision", TRACKER_KEY).model.revision == TRACKER_KEY
    snapshot = f"cache/models--a--b/snapshots/{TRACKER_KEY}"
    assert load(MINIMAL, "--model.init_from", snapshot).model.init_from == snapshot


def test_schedule_needs_a_type_and_numbers(load, problems):
    schedule = {"type": "power", "exponent": 1.7}
    assert (
        load(MINIMAL, "--model.insertion_schedule", "{type: power, exponent: 1.7}").model.insertion_schedule == schedule
    )
    assert "needs a type" in problems(MINIMAL, "--model.insertion_schedule", "{exponent: 1.7}")[0]
    assert (
        "exponent must be a number" in problems(MINIMAL, "--model.insertion_schedule", "{type: power, exponent: a}")[0]
    )


def test_lora_without_targets_is_refused(problems):
    (problem,) = problems(MINIMAL + "lora: {r: 8, lora_alpha: 8, target_modules: []}\n")
    assert problem == "recipe.yaml:15: lora.target_modules: must not be empty"


def test_mdm_refuses_fields_that_only_a_flexmdm_has(problems):
    (problem,) = problems(MINIMAL.replace("name: flexmdm", "name: mdm"), "--model.alpha_end", "0.99")
    assert "objective.name: mdm has no use for model.alpha_end" in problem


def test_importance_sampled_t_is_a_flexmdm_s_and_the_recipe_says_what_is_done(load, problems):
    mdm = MINIMAL.replace("name: flexmdm", "name: mdm")
    assert load(MINIMAL).objective.time_sampling == "importance" and load(mdm).objective.time_sampling == "uniform"
    assert load(MINIMAL, "--objective.time_sampling", "uniform").objective.time_sampling == "uniform"
    for schedule in ("insertion_schedule", "unmasking_schedule"):
        power = (f"--model.{schedule}", "{type: power, exponent: 2}")
        assert load(MINIMAL, *power).objective.time_sampling == "uniform"
        assert load(MINIMAL, *power, "--objective.time_sampling", "importance").objective.time_sampling == "importance"
        assert load(MINIMAL, f"--model.{schedule}", "{type: linear}").objective.time_sampling == "importance"
    (problem,) = problems(mdm, "--objective.time_sampling", "importance")
    assert problem.endswith("time_sampling: importance is for flexmdm; an mdm's t is uniform, as LLaDA's: remove it")


def test_an_mdms_token_budget_must_hold_its_window(load, problems):
    mdm = MINIMAL.replace("name: flexmdm", "name: mdm")
    (problem,) = problems(mdm, "--training.max_tokens_per_device", "63")
    assert "max_tokens_per_device: 63 cannot hold one document" in problem and "objective.window: 64" in problem
    assert load(mdm, "--training.max_tokens_per_device", "64").training.max_tokens_per_device == 64
    assert load(MINIMAL, "--training.max_tokens_per_device", "63").training.max_tokens_per_device == 63


def test_batch_sizes_must_multiply_to_documents_per_step(load, problems):
    sizes = ("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "2")
    training = load(MINIMAL, *sizes).training
    training.check_world_size(2)
    for world_size in (1, 3, 4):
        with pytest.raises(
            ValueError, match=rf"on {world_size} ranks makes {4 * world_size} documents.*documents_per_step: 8"
        ):
            training.check_world_size(world_size)
    load(MINIMAL, *sizes[:2]).training.check_world_size(2)  # accumulation is then 2
    load().training.check_world_size(3)  # nothing to check: documents are dealt out by length
    (problem,) = problems(MINIMAL, "--training.per_device_train_batch_size", "3")
    assert problem.startswith(
        "recipe.yaml:10: training: per_device_train_batch_size: 3 is no divisor of documents_per_step: 8"
    )


def test_construction_checks_as_loading_does(load):
    recipe = load()
    with pytest.raises(ValueError, match="max_steps"):
        dataclasses.replace(recipe.training, max_steps="8")
    assert dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, seed=3)).training.seed == 3


def test_every_field_is_documented():
    assert [name for name, _, meaning in describe_fields() if not meaning] == []


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
numbers = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, derandomize=True)
@example(text="1e5", prompts=["\x85", "\u2028", " a\t\r\n", "null", "日本"], number=1e-4, seed=0)
@given(
    text=texts,
    prompts=st.lists(texts | st.just(""), min_size=1, max_size=3),
    number=numbers,
    seed=st.integers(0, 2**64),
)
def test_written_recipe_is_read_back_equal(load, tmp_path_factory, text, prompts, number, seed):
    recipe = load(MINIMAL + "lora: {r: 8, lora_alpha: 8, target_modules: [q_proj]}\n")
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, init_from=text, insertion_schedule={"type": text, "exponent": number}),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=number),
        training=dataclasses.replace(recipe.training, seed=seed, report_to=["wandb"]),
        sampling=SamplingSection(prompts=prompts),
    )
    path = Path(tmp_path_factory.getbasetemp()) / "written.yaml"
    dump_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_written_recipe_without_lora_is_read_back_equal(load, tmp_path):
    dump_recipe(load(), tmp_path / "written.yaml")
    assert load_recipe(tmp_path / "written.yaml") == load()
