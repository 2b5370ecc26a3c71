"""The recipe's sections: every field with its type, bounds, default and meaning, and the contradictions between fields.

A field's documentation string is also what `retrofit train --help` prints. To add a field, add it here.
Paths are taken relative to the directory in which the command runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from retrofit.credentials import holds_token, mask

# ---------------------------------------------------------------------------------------------------------------- types


def _whole(value: Any) -> Any:
    """Lets `1e3` stand for 1000 where an integer is expected; anything else is left for the type check to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _rows_or_auto(value: Any) -> Any:
    value = _whole(value)
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("must be an integer of at least 1, or auto")
    return value


def _no_token(text: str) -> str:
    if holds_token(text):
        raise ValueError(
            f'holds something shaped like an access token ("{mask(text)}"); recipes are copied into every run, '
            "so remove it; log in with `hf auth login`, or set HF_TOKEN or WANDB_API_KEY in the environment"
        )
    return text


def _no_token_but_commit(text: str) -> str:
    return _no_token(text) if holds_token(text, may_be_commit=True) else text


def _checkpointing(value: Any) -> Any:
    if isinstance(value, bool) or value == "selective" or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError(f"expected true, false, a number of blocks, or selective, found {value!r}")


def _schedule(schedule: dict[str, Any]) -> dict[str, Any]:
    """Checks the form only; which types and parameters there are, `retrofit.flexmdm.schedules` knows."""
    if not isinstance(schedule.get("type"), str):
        raise ValueError("needs a type, for example {type: linear} or {type: power, exponent: 1.7}")
    for name, value in schedule.items():
        if name != "type" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} must be a number")
    return schedule


PositiveInt = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
RowsOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_rows_or_auto)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
ProperFraction = Annotated[float, Field(ge=0, lt=1)]
Checkpointing = Annotated[bool | int | Literal["selective"], BeforeValidator(_checkpointing), BeforeValidator(_whole)]
Prompt = Annotated[str, AfterValidator(_no_token)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_no_token)]
Revision = Annotated[str, Field(min_length=1), AfterValidator(_no_token_but_commit)]
Schedule = Annotated[dict[str, Any], AfterValidator(_schedule)]

# Strict: no conversion between types. A failing value is not echoed by pydantic, since it might be a token.
_STRICT = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True, use_attribute_docstrings=True
)

# ------------------------------------------------------------------------------------------------------------- sections


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class ModelSection:
    """What training starts from. Fields that are null are inherited from the checkpoint, or else take the default."""

    init_from: Text
    """run directory, checkpoint, adapter, merged directory or Hub id whose weights training starts from"""
    revision: Revision | None = None
    """branch, tag or commit of a Hub id"""
    merge_first: bool = False
    """merge the adapter found at init_from into its base, instead of continuing its factors"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """storage of the frozen weights; trainable ones are always float32"""
    insertion_schedule: Schedule | None = None
    """alpha, the insertion schedule, for example {type: power, exponent: 1.7}"""
    unmasking_schedule: Schedule | None = None
    """beta, the unmasking schedule, in the same form"""
    alpha_end: Annotated[float, Field(gt=0, le=1)] | None = None
    """value of alpha at which insertion ends"""
    time_input: Literal["alpha", "t"] | None = None
    """what the time embedding is fed; with alpha the model is valid for other schedules too"""
    time_group_size: PositiveInt | None = None
    """blocks that share one time modulation"""
    time_embedding_size: PositiveInt | None = None
    """width of the sinusoidal time embedding"""
    time_hidden_size: PositiveInt | None = None
    """hidden width of the time embedding's MLP"""


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class LoraSection:
    """Low-rank adaptation by PEFT. Without this section all weights are trained."""

    r: PositiveInt
    """rank of the factors"""
    lora_alpha: PositiveFloat
    """scale: the update is multiplied by lora_alpha / r"""
    lora_dropout: ProperFraction = 0.0
    """dropout probability on the factors' input; exact resumption across world sizes needs 0"""
    target_modules: Annotated[list[Text], Field(min_length=1)]
    """names of the adapted modules, for example [q_proj, k_proj, v_proj]; each must match at least one"""


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class DataSection:
    """The prepared data."""

    path: Text
    """directory written by `retrofit preprocess`"""
    num_workers: Count = 1
    """processes per rank that draw steps ahead; 0: the device waits for each. Does not change what is trained on"""


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class ObjectiveSection:
    """The training objective."""

    name: Literal["flexmdm", "mdm"]
    """flexmdm (variable length) or mdm (LLaDA's own fixed-window objective, the baseline)"""
    window: PositiveInt
    """tokens; the loss is divided by documents times window, and an mdm pads its documents to it"""
    time_strata: PositiveInt | None = None
    """consecutive draws over which t is stratified and permuted; null: documents_per_step"""
    time_sampling: Literal["uniform", "importance"] | None = None
    """density of t; both have the same mean loss; null: importance if its schedules are linear, else uniform"""

    def __post_init__(self) -> None:
        if self.name == "mdm" and self.time_sampling == "importance":
            raise ValueError("time_sampling: importance is for flexmdm; an mdm's t is uniform, as LLaDA's: remove it")


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class OptimizerSection:
    """AdamW with warm-up and decay, and gradient clipping."""

    learning_rate: PositiveFloat
    """peak learning rate"""
    new_modules_learning_rate: PositiveFloat | None = None
    """peak learning rate of the time conditioning, flags and insertion head; null: learning_rate"""
    weight_decay: NonNegativeFloat = 0.01
    """decoupled weight decay on matrices; LoRA factors, norms and biases have none"""
    adam_beta1: ProperFraction = 0.9
    """decay of the gradient's running mean"""
    adam_beta2: ProperFraction = 0.999
    """decay of the squared gradient's running mean"""
    adam_epsilon: PositiveFloat = 1e-8
    """added to the denominator"""
    max_grad_norm: PositiveFloat | None = 1.0
    """global gradient norm above which gradients are scaled down; null: no clipping"""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """decay after warm-up, to min_lr_ratio at max_steps"""
    warmup_ratio: Fraction = 0.05
    """fraction of max_steps over which the rate rises linearly from 0"""
    min_lr_ratio: Fraction = 0.0
    """last learning rate as a fraction of the peak"""


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class TrainingSection:
    """How long, how large, and what is written when. A step is one optimizer step."""

    output_dir: Text
    """run directory; if it holds a run of this recipe, training resumes"""
    seed: Annotated[Count, Field(lt=2**63)] = 0
    """seed of initialisation, order, t and noise"""
    max_steps: PositiveInt
    """steps to train, counted from the start of the run"""
    documents_per_step: PositiveInt
    """documents of one step over all ranks: the one batch size that defines training"""
    max_tokens_per_device: RowsOrAuto = 16384
    """rows of one micro-batch on one rank; bounds memory, not what is trained on; auto: the most that fit"""
    per_device_train_batch_size: PositiveInt | None = None
    """optional: times gradient_accumulation_steps times ranks it must be documents_per_step"""
    gradient_accumulation_steps: PositiveInt | None = None
    """optional, see per_device_train_batch_size: at least so many micro-batches; max_tokens_per_device may make more"""
    bf16: bool = False
    """compute in bfloat16 under autocast"""
    attention: Literal["auto", "padded", "varlen", "flash", "flex"] = "auto"
    """how attention is computed: in a padded block, by torch's variable-length kernel, by the package flash-attn, or by
    torch's flex attention; the last three need a GPU"""
    gradient_checkpointing: Checkpointing = False
    """blocks recomputed in the backward pass, to save memory: all (true), every n-th (n), or in all of them what is
    cheap (selective)"""
    compile: bool = False
    """compile the blocks (torch.compile); the first step takes a minute or more"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay per step of the averaged weights; null: none kept"""
    save_steps: PositiveInt
    """steps between checkpoints"""
    save_total_limit: PositiveInt | None = None
    """checkpoints kept, the newest first; null: all"""
    save_every_keep: PositiveInt | None = None
    """checkpoints at multiples of this step are kept for good, beside save_total_limit; null: none is"""
    skip_steps: list[PositiveInt] = field(default_factory=list)
    """steps (counted from 1) whose documents are passed over without an update, after a loss that was not finite"""
    stop_after_minutes: PositiveFloat | None = None
    """save and stop after this time, as after a signal (exit code 75); null: no limit"""
    step_timeout_minutes: PositiveFloat = 15.0
    """time without progress after which a rank that hangs is named and the run ends"""
    start_timeout_minutes: PositiveFloat = 60.0
    """the same for everything up to the end of a process's first step, where kernels are compiled"""
    eval_steps: PositiveInt | None = None
    """steps between measurements of the held-out loss; null: none"""
    eval_documents: PositiveInt = 256
    """held-out documents measured"""
    logging_steps: PositiveInt = 10
    """steps between lines of the log"""
    sample_steps: PositiveInt | None = None
    """steps between samples drawn while training; null: none"""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """trackers besides log.jsonl, which is always written"""

    def __post_init__(self) -> None:
        if self.save_every_keep is not None and self.save_every_keep % self.save_steps:
            raise ValueError(
                f"save_every_keep: {self.save_every_keep} is no multiple of save_steps: {self.save_steps}, "
                "so no checkpoint would be kept for it"
            )
        if self.attention in ("varlen", "flash") and not self.bf16:
            raise ValueError(f"attention: {self.attention} computes in half precision; set bf16: true, or choose auto")
        known = (self.per_device_train_batch_size or 1) * (self.gradient_accumulation_steps or 1)
        if self.documents_per_step % known:
            raise ValueError(f"{self._batch()} is no divisor of documents_per_step: {self.documents_per_step}")

    def check_world_size(self, world_size: int) -> None:
        """Refuses batch sizes that do not multiply to documents_per_step over `world_size` ranks (ValueError).

        Does nothing where neither per_device_train_batch_size nor gradient_accumulation_steps is given.
        """
        sizes = (self.per_device_train_batch_size, self.gradient_accumulation_steps)
        product = world_size * (sizes[0] or 1) * (sizes[1] or 1)
        wrong = self.documents_per_step != product if None not in sizes else self.documents_per_step % product
        if sizes != (None, None) and wrong:
            raise ValueError(
                f"training: {self._batch()} on {world_size} ranks makes {product} documents, which contradicts "
                f"documents_per_step: {self.documents_per_step}; change one of them or leave the former out"
            )

    def _batch(self) -> str:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        return " x ".join(f"{name}: {getattr(self, name)}" for name in names if getattr(self, name) is not None)


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class SamplingSection:
    """Samples drawn while training, every training.sample_steps steps."""

    prompts: Annotated[list[Prompt], Field(min_length=1)] = field(default_factory=lambda: [""])
    """texts to continue; the empty text gives an unconditional sample"""
    chat: bool = False
    """the prompts are questions: wrap them in the chat template"""
    steps: PositiveInt = 64
    """sampling steps"""
    order: Literal["random", "confidence"] = "random"
    """which masks are written first"""
    temperature: NonNegativeFloat = 1.0
    """of the token distribution; 0 takes the likeliest token"""


@dataclass(config=_STRICT, kw_only=True, frozen=True)
class Recipe:
    """A whole recipe. Errors of construction are ValueErrors."""

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection
    optimizer: OptimizerSection
    training: TrainingSection
    lora: LoraSection | None = None
    sampling: SamplingSection = field(default_factory=SamplingSection)

    def __post_init__(self) -> None:
        if self.objective.time_sampling is None:  # recipes are recorded with what was done
            # With other schedules importance was measured to gain little, and to cost insertion (benchmarks/README.md).
            schedules = (self.model.insertion_schedule, self.model.unmasking_schedule)
            linear = all(schedule is None or schedule["type"] == "linear" for schedule in schedules)
            chosen = "importance" if linear and self.objective.name == "flexmdm" else "uniform"
            object.__setattr__(self.objective, "time_sampling", chosen)
        if self.objective.name == "mdm":
            # The documents of a flexmdm keep their own lengths, which are compared with the budget when the data are.
            budget = self.training.max_tokens_per_device
            if budget != "auto" and budget < self.objective.window:
                raise ValueError(
                    f"training.max_tokens_per_device: {budget} cannot hold one document, "
                    f"which an mdm pads to objective.window: {self.objective.window} tokens; make it at least that"
                )
            variable_length = [f"model.{name}" for name in FLEXMDM_FIELDS if getattr(self.model, name) is not None]
            if self.optimizer.new_modules_learning_rate is not None:
                variable_length.append("optimizer.new_modules_learning_rate")
            if variable_length:
                raise ValueError(
                    f"objective.name: mdm has no use for {', '.join(variable_length)}; remove or choose flexmdm"
                )


FLEXMDM_FIELDS = (
    "insertion_schedule", "unmasking_schedule", "alpha_end", "time_input",
    "time_group_size", "time_embedding_size", "time_hidden_size",
)  # fmt: skip

SECTIONS: Mapping[str, type] = {
    "model": ModelSection,
    "lora": LoraSection,
    "data": DataSection,
    "objective": ObjectiveSection,
    "optimizer": OptimizerSection,
    "training": TrainingSection,
    "sampling": SamplingSection,
}
OPTIONAL_SECTIONS = ("lora", "sampling")


def default_of(name: str) -> Any:
    """The default of `section.field`, None where it has none."""
    section, _, field_name = name.partition(".")
    info = SECTIONS[section].__pydantic_fields__.get(field_name)  # type: ignore[attr-defined]
    return None if info is None or info.is_required() else info.get_default(call_default_factory=True)
