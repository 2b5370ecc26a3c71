"""Configurations of LLaDA and FlexMDM. They carry the model's meaning: schedules, time input, head form, ids."""

from __future__ import annotations

import difflib
import math
from typing import Any

from transformers import PretrainedConfig

from .schedules import Schedules, schedule_from_dict

# What the released LLaDA configs say beyond shapes and ids, and the one value of each that is implemented.
_FIXED = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_dropout": (0, None),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "embedding_dropout": (0, None),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (False, None),
    "residual_dropout": (0, None),
    "rope": (True,),
    "rope_full_precision": (True,),
    "scale_logits": (False,),
}
# Fields of the released configs that change nothing computed here.
_IGNORED = (
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "init_fn",
    "mlp_ratio",
    "precision",
    "use_cache",
)

# What lets transformers load an exported folder by the code in it. LLaDA's own says AutoModelForCausalLM too.
LLADA_AUTO_MAP = {"AutoConfig": "configuration.LLaDAConfig"} | dict.fromkeys(
    ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"), "llada.LLaDAForMaskedDiffusion"
)
FLEXMDM_AUTO_MAP = {"AutoConfig": "configuration.FlexMDMConfig"} | dict.fromkeys(
    ("AutoModel", "AutoModelForMaskedLM"), "modeling.FlexMDMForMaskedDiffusion"
)


class LLaDAConfig(PretrainedConfig):
    """The released LLaDA configuration (LLaDA-8B Base and Instruct, 1.5, iLLaDA), its field names kept.

    Args:
        vocab_size: rows of the embedding.
        d_model, n_layers, n_heads: widths and depth.
        n_kv_heads: key/value heads (grouped-query attention); None means as many as `n_heads`.
        mlp_hidden_size: width of the gated MLP.
        max_sequence_length: longest sequence, in tokens.
        weight_tying: whether the LM head is the embedding.
        mask_token_id, pad_token_id, eos_token_id, bos_token_id: token ids.

    Raises:
        ValueError: a field asks for a computation that is not implemented, is unknown, or is out of range.
    """

    model_type = "llada"

    def __init__(
        self,
        vocab_size: int = 126464,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int = 12288,
        max_sequence_length: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        init_std: float = 0.02,
        weight_tying: bool = False,
        mask_token_id: int = 126336,
        pad_token_id: int = 126081,
        eos_token_id: int = 126081,
        bos_token_id: int | None = None,
        embedding_size: int | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.mlp_hidden_size = mlp_hidden_size
        self.max_sequence_length = max_sequence_length
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.init_std = init_std
        self.weight_tying = weight_tying
        self.mask_token_id = mask_token_id
        self._refuse_unsupported(kwargs)
        for name in (*_FIXED, *_IGNORED):
            kwargs.pop(name, None)
        if self.model_type == "llada" and kwargs.get("auto_map") != LLADA_AUTO_MAP:
            kwargs.pop("auto_map", None)  # names LLaDA's remote code, which is never run and would not fit what we save
        if kwargs.setdefault("tie_word_embeddings", weight_tying) != weight_tying:
            raise ValueError("config.json: `weight_tying` and `tie_word_embeddings` contradict each other")
        super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, bos_token_id=bos_token_id, **kwargs)
        self._validate()

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads

    def _refuse_unsupported(self, flags: dict[str, Any]) -> None:
        general = {name for name in dir(PretrainedConfig()) if not name.startswith("_")}
        general |= {
            "auto_map",
            "torch_dtype",
            "dtype",
            "tie_word_embeddings",
            "transformers_version",
            "attn_implementation",
            "experts_implementation",  # transformers 5.0 gives it to every configuration
        }
        for name, value in flags.items():
            if name in _FIXED:
                if value not in _FIXED[name]:
                    raise ValueError(f"config.json: `{name}` is {value!r}; only {_FIXED[name][0]!r} is supported")
            elif name not in general and name not in _IGNORED and not name.startswith("_"):
                near = difflib.get_close_matches(name, [*vars(self), *_FIXED, *_IGNORED], 1)
                hint = f"; nearest known field: `{near[0]}`" if near else ""
                raise ValueError(f"config.json: field `{name}` is not known to this model{hint}")

    def _validate(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "max_sequence_length")
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config.json: `{name}` must be a positive integer, found {value!r}")
        if self.embedding_size != self.vocab_size:
            raise ValueError(
                f"config.json: `embedding_size` {self.embedding_size} differs from `vocab_size` {self.vocab_size}; "
                "only equal sizes are supported"
            )
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"config.json: `d_model` {self.d_model} is no even multiple of `n_heads` {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config.json: `n_heads` {self.n_heads} is no multiple of `n_kv_heads` {self.n_kv_heads}")
        for name in ("mask_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(self, name)
            if name == "bos_token_id" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"config.json: `{name}` {value!r} is not a row of the embedding (vocab_size {self.vocab_size})"
                )


class FlexMDMConfig(LLaDAConfig):
    """LLaDA's configuration and what makes it a FlexMDM.

    Args:
        insertion_schedule, unmasking_schedule: JSON form of a schedule, such as {"type": "linear"}.
        alpha_end: where insertion ends (see `Schedules`).
        time_input: what the network is fed: "alpha" (alpha(t), valid under any schedule at sampling) or "t".
        time_scale: factor on the time input before the sinusoid.
        time_embedding_size: width of the sinusoid; None means d_model.
        time_hidden_size: hidden width of the time MLP; None means 4 d_model.
        time_group_size: blocks that share one AdaLN linear.
        insertion_head_form: "correction" (log y = z + log((1 - alpha) n / (n alpha + 1))) or, for imported checkpoints,
            "softplus" (y = max_gap softplus(z)).
        mean_deletable_tokens: n of the correction form, the data's mean number of deletable tokens.
        max_gap: bound of an expected gap, and scale of the softplus form; None means max_sequence_length.
        token_flags: whether the input has the "kept" and "closed gap" flags (imported checkpoints have not).
        banned_token_ids: ids that sampling never writes besides mask, pad and EOS: headers, end of turn.
        base_model, base_revision: the LLaDA that this model was made from.

    Raises:
        ValueError: as LLaDAConfig; a schedule or one of the fields above is out of range.
    """

    model_type = "flexmdm"

    def __init__(
        self,
        insertion_schedule: dict[str, Any] | None = None,
        unmasking_schedule: dict[str, Any] | None = None,
        alpha_end: float = 1 - 1e-3,
        time_input: str = "alpha",
        time_scale: float = 1000.0,
        time_embedding_size: int | None = None,
        time_hidden_size: int | None = None,
        time_group_size: int = 8,
        insertion_head_form: str = "correction",
        mean_deletable_tokens: float = 256.0,
        max_gap: float | None = None,
        token_flags: bool = True,
        banned_token_ids: list[int] | None = None,
        base_model: str | None = None,
        base_revision: str | None = None,
        **kwargs: Any,
    ):
        self.insertion_schedule = insertion_schedule or {"type": "linear"}
        self.unmasking_schedule = unmasking_schedule or {"type": "linear"}
        self.alpha_end = alpha_end
        self.time_input = time_input
        self.time_scale = time_scale
        d_model = kwargs.get("d_model", 4096)
        self.time_embedding_size = d_model if time_embedding_size is None else time_embedding_size
        self.time_hidden_size = 4 * d_model if time_hidden_size is None else time_hidden_size
        self.time_group_size = time_group_size
        self.insertion_head_form = insertion_head_form
        self.mean_deletable_tokens = mean_deletable_tokens
        self.token_flags = token_flags
        self.banned_token_ids = banned_token_ids or []
        self.base_model = base_model
        self.base_revision = base_revision
        self.max_gap = kwargs.get("max_sequence_length", 4096) if max_gap is None else max_gap
        super().__init__(**kwargs)

    def _validate(self) -> None:
        super()._validate()
        choices = {"time_input": ("alpha", "t"), "insertion_head_form": ("correction", "softplus")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"config.json: `{name}` must be one of {known}, found {getattr(self, name)!r}")
        for name in ("time_scale", "time_embedding_size", "time_hidden_size", "time_group_size", "max_gap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"config.json: `{name}` must be a positive number, found {value!r}")
        mean = self.mean_deletable_tokens
        if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not 0 < mean < math.inf:
            raise ValueError(f"config.json: `mean_deletable_tokens` must be a positive number, found {mean!r}")
        if self.time_embedding_size % 2:
            raise ValueError(f"config.json: `time_embedding_size` must be even, found {self.time_embedding_size}")
        for token in self.banned_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(f"config.json: `banned_token_ids` holds {token!r}, no row of the embedding")
        for name in ("insertion_schedule", "unmasking_schedule"):
            try:
                schedule_from_dict(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"config.json: `{name}`: {error}") from error
        _ = self.schedules  # refuses an alpha_end out of range

    @property
    def schedules(self) -> Schedules:
        """The schedules that this model was trained with."""
        return Schedules(
            insertion=schedule_from_dict(self.insertion_schedule),
            unmasking=schedule_from_dict(self.unmasking_schedule),
            alpha_end=self.alpha_end,
        )

    @property
    def num_time_groups(self) -> int:
        """Number of AdaLN linears: blocks divided by the group size, rounded up."""
        return -(-self.n_layers // self.time_group_size)
