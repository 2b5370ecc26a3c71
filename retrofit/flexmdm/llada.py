"""LLaDA, written natively: bidirectional LLaMA-shaped blocks over packed rows, with the released key names.

Shape legend: T packed rows, B sequences, L padded length, d model width, H query heads, K key/value heads, D head size,
V vocabulary, M rows that get logits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .attention import Plan, attention, choose_backend, plan_attention
from .configuration import LLaDAConfig
from .packing import PackedSequences, cumulative_lengths, lengths_from_mask

if TYPE_CHECKING:
    from .schedules import Schedules  # noqa: F401 (see modeling.py)

Modulation = tuple[Tensor, Tensor]  # gain and shift, each [T, d]


class RMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics, cast back before the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[T, d] -> [T, d]."""
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotary_angles(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding (RoFormer, arXiv 2104.09864), half-split layout.

    Returns:
        two float32 tensors [T, 1, D].
    """
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions.float()[:, None] * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Applies the rotary embedding to [T, H, D] in float32."""
    cos, sin = rotary
    full = x.float()
    first, second = full.chunk(2, dim=-1)
    return (full * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def modulate(x: Tensor, modulation: Modulation | None) -> Tensor:
    """Adaptive layer norm: x gain + shift (Peebles and Xie, arXiv 2212.09748, where the gain is 1 + scale)."""
    if modulation is None:
        return x
    gain, shift = modulation
    # The modulation may be float32 beside a bfloat16 backbone; the stream keeps the backbone's dtype.
    return (x * gain + shift).to(x.dtype)


class LLaDABlock(nn.Module):
    """Pre-norm attention and gated MLP, without biases.

    Attributes:
        gradient_checkpointing: whether the block is recomputed in the backward pass.
        compiled: `LLaDABlock.run`, compiled for all blocks, or None.
    """

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = checkpoint
        self.compiled: Callable[..., Tensor] | None = None
        self.head_size = config.head_size
        kv_size = config.n_kv_heads * self.head_size
        self.attn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def forward(
        self, x: Tensor, plan: Plan | None, rotary: tuple[Tensor, Tensor], modulation: Modulation | None
    ) -> Tensor:
        """[T, d] -> [T, d]."""
        # Of no rows, or one, the compiler would make graphs of their own.
        run = LLaDABlock.run if self.compiled is None or x.shape[0] < 2 else self.compiled
        return run(self, x, plan, rotary, modulation)

    def run(self, *inputs: Any) -> Tensor:
        """`compute`, recomputed in the backward pass where that is asked for: this is what is compiled."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, self._gradient_checkpointing_func(self.compute, *inputs))
        return self.compute(*inputs)

    def compute(
        self, x: Tensor, plan: Plan | None, rotary: tuple[Tensor, Tensor], modulation: Modulation | None
    ) -> Tensor:
        """See `forward`."""
        h = modulate(self.attn_norm(x), modulation)
        q, k, v = (proj(h).unflatten(-1, (-1, self.head_size)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attention(rotate(q, rotary), rotate(k, rotary), v, plan)
        x = x + self.attn_out(mixed.flatten(1))
        h = modulate(self.ff_norm(x), modulation)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


_KEPT_ATTENTION = (
    "aten._scaled_dot_product",
    "torch_attn._varlen_attn",
    "flash_attn._flash_attn_varlen_forward",
    "flex_attention",
)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing: keep the results of attention, and of matrix products that are dear for their size.

    A product of few terms, as LoRA's second factor, costs less to compute again than its result takes to keep.
    """
    name = str(op)
    if name.startswith("aten.mm."):
        terms, width = args[1].shape
        return CheckpointPolicy.MUST_SAVE if 8 * terms >= width else CheckpointPolicy.PREFER_RECOMPUTE
    kept = name.startswith(_KEPT_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class LLaDAModel(nn.Module):
    """The backbone: embedding, blocks, final norm, and the LM head unless it is tied to the embedding.

    Attributes:
        attention: the back-end, "auto" or one of `attention.BACKENDS` (see `choose_backend`).
    """

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.config = config
        self.attention = "auto"
        modules: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.vocab_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            modules["ff_out"] = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.transformer = nn.ModuleDict(modules)

    def forward(
        self, packed: PackedSequences, *, added: Tensor | None = None, modulations: list[Modulation] | None = None
    ) -> Tensor:
        """Final hidden states, after the last norm.

        Args:
            packed: T rows.
            added: [T, d] added to the token embeddings, or None.
            modulations: one (gain, shift) for each block, or None. Blocks that share one keep it for backward once.

        Returns:
            [T, d].
        """
        x = self.transformer["wte"](packed.tokens)
        if added is not None:
            x = x + added.to(x.dtype)
        plan = self._plan(packed, x)
        rotary = rotary_angles(packed.positions, self.config.head_size, self.config.rope_theta)
        for i, block in enumerate(self.blocks):
            x = block(x, plan, rotary, None if modulations is None else modulations[i])
        return self.transformer["ln_f"](x)

    @property
    def blocks(self) -> list[LLaDABlock]:
        return list(cast(Iterable[LLaDABlock], self.transformer["blocks"]))

    def _plan(self, packed: PackedSequences, x: Tensor) -> Plan | None:
        """How this batch attends, with the dtype that the blocks will compute in."""
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        backend = choose_backend(self.attention, x.device, dtype, self.config.head_size)
        compiled = self.blocks[0].compiled is not None
        return plan_attention(packed, backend, bound=self.config.max_sequence_length if compiled else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head: [M, d] -> [M, V]."""
        if self.config.weight_tying:
            return F.linear(hidden, cast(nn.Embedding, self.transformer["wte"]).weight)
        return self.transformer["ff_out"](hidden)


@dataclass
class LLaDAOutput(ModelOutput):
    """logits: [M, V] of a packed call, [B, L, V] of a dense one; last_hidden_state: [T, d] or [B, L, d]."""

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


class LLaDAPreTrainedModel(PreTrainedModel):
    """What both models share with transformers: initialisation, checkpointing, and strict loading."""

    config_class: type[LLaDAConfig] = LLaDAConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]
    _supports_sdpa = True

    model: LLaDAModel

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, (RMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.weight_tying else self.model.transformer["ff_out"]

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        selective: bool = False,
        offload: bool = False,
    ) -> None:
        """Recomputes blocks in the backward pass, instead of keeping what they computed.

        Non-reentrant by default, since a frozen embedding's output has no gradient. transformers' other name for this,
        `activation_checkpointing_enable`, calls it too.

        Args:
            gradient_checkpointing_kwargs: of torch.utils.checkpoint.checkpoint.
            every_n_layers: blocks 0, n, 2 n, ... are recomputed.
            selective: the results of matrix products and of attention are kept; what is cheap is recomputed.
            offload: not supported (ValueError).
        """
        if offload:
            raise ValueError("gradient checkpointing: offload is not supported; leave it out")
        kwargs: dict[str, Any] = {"use_reentrant": False}
        if selective:
            kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        kwargs |= gradient_checkpointing_kwargs or {}
        for i, block in enumerate(self.model.blocks):
            block.gradient_checkpointing = i % every_n_layers == 0
            block._gradient_checkpointing_func = partial(checkpoint, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        for block in self.model.blocks:
            block.gradient_checkpointing = False

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles the blocks, all by the same graphs, for batches of any shape (`torch.compile`).

        Modules, their names and their hooks stay as they are, so an engine may wrap them afterwards.
        """
        # A block is small beside DDP's buckets, and DDP's own splitting refuses gradient checkpointing in a graph.
        torch._dynamo.config.optimize_ddp = False
        torch._dynamo.config.specialize_float = True  # norms' epsilon, LoRA's scale
        torch.fx.experimental._config.use_duck_shape = False  # that rows are as many as a width means nothing
        compiled = torch.compile(LLaDABlock.run, backend=backend, dynamic=True)
        for block in self.model.blocks:
            block.compiled = compiled

    @classmethod
    def _load_strictly(
        cls, path: str | os.PathLike[str], config: LLaDAConfig, fresh: tuple[str, ...], **kwargs: Any
    ) -> Any:
        """transformers' from_pretrained, with every missing, surplus or misshapen tensor an error.

        Args:
            fresh: names of top-level modules that the checkpoint has nothing of and that are freshly initialised.

        Raises:
            ValueError: a file or tensor is missing, surplus or misshapen (named).
        """
        check_weight_files(os.path.join(path, kwargs.get("subfolder", "")))
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.update(ignore_mismatched_sizes=True, use_safetensors=True, output_loading_info=True)
        model: PreTrainedModel
        info: dict[str, Any]
        with _without_load_report():
            model, info = super().from_pretrained(path, config=config, **kwargs)
        new = {name for name in model.state_dict() if name.split(".")[0] in fresh}
        refuse_misfits(
            path,
            cls.__name__,
            missing=set(info["missing_keys"]) - new,
            surplus={*info["unexpected_keys"], *(new - set(info["missing_keys"]))},
            misshapen=[f"{key} {list(theirs)} for {list(ours)}" for key, theirs, ours in info["mismatched_keys"]],
        )
        return (model, info) if wants_info else model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silences transformers' warnings about missing and surplus tensors, which are errors or intended here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def refuse_misfits(
    path: str | os.PathLike[str],
    model_class: str,
    *,
    missing: Iterable[str],
    surplus: Iterable[str],
    misshapen: Iterable[str],
) -> None:
    """Refuses weights whose tensors are not those of the model.

    Args:
        misshapen: `name [shape in the file] for [shape in the model]`.

    Raises:
        ValueError: any of the three has an entry (how many, and the first names).
    """
    for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)):
        listed = sorted(names)
        if listed:
            raise ValueError(
                f"{path}: {len(listed)} {kind} tensors for {model_class}: {', '.join(listed[:4])}"
                f"{' ...' if len(listed) > 4 else ''}; the weights do not belong to this config.json"
            )


def read_config(path: str | os.PathLike[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """config.json of a directory or Hub id, found with those of from_pretrained's arguments that say where to look.

    Without its auto_map: a model that is not loaded by it saves no code beside its weights.
    """
    where = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
    config, _ = LLaDAConfig.get_config_dict(path, **{name: arguments[name] for name in where if name in arguments})
    return {name: value for name, value in config.items() if name != "auto_map"}


def check_weight_files(path: str | os.PathLike[str]) -> None:
    """Refuses a local directory whose weights are absent or incomplete.

    Raises:
        ValueError: no safetensors weights, an unreadable index, or a shard that the index names is missing.
    """
    if not os.path.isdir(path):
        return  # a Hub id: transformers downloads what the index names
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.isfile(os.path.join(path, "model.safetensors")):
        return
    adapter = ("adapter_config.json", os.path.join("adapter", "adapter_config.json"))
    if any(os.path.isfile(os.path.join(path, name)) for name in adapter):
        raise ValueError(
            f"{path}: holds a LoRA adapter, not a whole model; load it with retrofit.checkpoints.loading.load_model, "
            "or its base here and the adapter with PeftModel.from_pretrained"
        )
    if not os.path.isfile(index):
        raise ValueError(f"{path}: holds neither model.safetensors nor model.safetensors.index.json")
    try:
        with open(index, encoding="utf-8") as file:
            shards = sorted({str(shard) for shard in json.load(file)["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: is not a safetensors index ({error})") from error
    for shard in shards:
        if os.path.basename(shard) != shard:
            raise ValueError(f"{index}: shard name {shard!r} leaves the directory")
        if not os.path.isfile(os.path.join(path, shard)):
            raise ValueError(f"{path}: {shard} is missing, though the index names it (incomplete download?)")


def dense_layout(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lengths int64 [B] and token positions bool [B, L] of a dense call."""
    if attention_mask is None:
        lengths = torch.full((input_ids.shape[0],), input_ids.shape[1], device=input_ids.device)
    else:
        lengths = lengths_from_mask(attention_mask)
    return lengths, torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]


def mask_rows(packed: PackedSequences, mask_token_id: int) -> Tensor:
    """int64 [M]: the rows that hold the mask token."""
    return (packed.tokens == mask_token_id).nonzero().squeeze(-1)


class LLaDAForMaskedDiffusion(LLaDAPreTrainedModel):
    """LLaDA: logits, unshifted, for every masked token (arXiv 2502.09992)."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *args: Any, config: LLaDAConfig | None = None, **kwargs: Any
    ) -> Any:
        """Loads a released-layout directory or Hub id (one file or sharded), strictly.

        Raises:
            ValueError: see `_load_strictly`; the config asks for something unsupported or is not LLaDA's.
        """
        config_dict = read_config(path, kwargs)
        if config_dict.get("model_type") != LLaDAConfig.model_type:
            raise ValueError(
                f"{path}: config.json has model_type {config_dict.get('model_type')!r}, LLaDA needs 'llada'"
            )
        config = config or LLaDAConfig.from_dict(config_dict)
        return cls._load_strictly(path, config, (), **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        packed: PackedSequences | None = None,
        logit_rows: Tensor | None = None,
    ) -> LLaDAOutput:
        """Dense call: input_ids int64 [B, L], attention_mask [B, L] (padding on the right).

        Packed call: `packed` (no slots), and `logit_rows` int64 [M], the rows that get logits (default: the masks).
        """
        if packed is not None:
            rows = mask_rows(packed, self.config.mask_token_id) if logit_rows is None else logit_rows
            hidden = self.model(packed)
            return LLaDAOutput(logits=self.model.logits(hidden[rows]), last_hidden_state=hidden)
        if input_ids is None:
            raise ValueError("forward needs input_ids or packed")
        lengths, occupied = dense_layout(input_ids, attention_mask)
        hidden = self.model(PackedSequences(input_ids[occupied], cumulative_lengths(lengths)))
        dense = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
        dense[occupied] = hidden
        logits = hidden.new_zeros(*input_ids.shape, self.config.vocab_size)
        logits[occupied] = self.model.logits(hidden)
        return LLaDAOutput(logits=logits, last_hidden_state=dense)
