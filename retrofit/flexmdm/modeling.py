"""FlexMDM: LLaDA with time conditioning and a head for the expected number of missing tokens in each gap.

Shape legend: T packed rows (slots included), B sequences, L padded length, d model width, V vocabulary, M logit rows,
G groups of blocks that share an AdaLN linear.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration import FlexMDMConfig, LLaDAConfig
from .llada import LLaDAModel, LLaDAPreTrainedModel, dense_layout, mask_rows, read_config
from .packing import PackedSequences, cumulative_lengths

if TYPE_CHECKING:
    # All siblings are named in this file, since transformers 4.57 copies no others of a model folder's code.
    from .attention import Plan  # noqa: F401
    from .noise import keyed_uniform  # noqa: F401
    from .sampling import Prompt, Sample
    from .schedules import Schedules  # noqa: F401

# Below this a gap of float32 would underflow to 0, whose logarithm the loss takes.
_LEAST_LOG_GAP = -60.0

NEW_MODULES = ("time_conditioning", "flag_embedding", "insertion_head")


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero, so that a retrofitted model starts as its base."""


def sinusoid(time: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding, cosines first: [B] -> float32 [B, size], periods from 2 pi to 2 pi 10^4."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=time.device, dtype=torch.float32))
    angles = time.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeConditioning(nn.Module):
    """Time -> sinusoid -> MLP -> one zero-initialised AdaLN linear for each group of blocks."""

    def __init__(self, config: FlexMDMConfig):
        super().__init__()
        self.embedding_size = config.time_embedding_size
        self.hidden = nn.Linear(config.time_embedding_size, config.time_hidden_size)
        self.output = nn.Linear(config.time_hidden_size, config.d_model)
        self.modulations = nn.ModuleList(
            ZeroLinear(config.d_model, 2 * config.d_model) for _ in range(config.num_time_groups)
        )

    def forward(self, time: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B] -> G pairs of (scale [B, d], shift [B, d]), in the dtype of the weights."""
        # B rows cost nothing, and bfloat16 would merge neighbouring times.
        with torch.autocast(time.device.type, enabled=False):
            embedding = sinusoid(time, self.embedding_size).to(self.hidden.weight.dtype)
            embedding = self.output(F.silu(self.hidden(embedding)))
            return [linear(embedding).chunk(2, dim=-1) for linear in self.modulations]


class InsertionHead(nn.Module):
    """Hidden state of a row -> expected number of tokens missing in the gap before it."""

    def __init__(self, config: FlexMDMConfig):
        super().__init__()
        self.form = config.insertion_head_form
        self.max_gap = config.max_gap
        self.norm = nn.LayerNorm(config.d_model)
        self.hidden = nn.Linear(config.d_model, config.d_model)
        self.output = ZeroLinear(config.d_model, 1)

    def forward(self, hidden: Tensor, log_prior: Tensor) -> Tensor:
        """Expected gaps.

        Args:
            hidden: [T, d], after the final norm.
            log_prior: float32 [T], log of the best guess that knows alpha alone (unused by the softplus form).

        Returns:
            float32 [T].
        """
        h = F.gelu(self.hidden(self.norm(hidden.to(self.norm.weight.dtype))))
        with torch.autocast(h.device.type, enabled=False):
            z = self.output(h.to(self.output.weight.dtype)).squeeze(-1).float()
        if self.form == "softplus":
            return self.max_gap * F.softplus(z)
        # A smooth minimum with log(max_gap): a hard clamp would have no gradient beyond it.
        bound = math.log(self.max_gap)
        log_y = bound - F.softplus(bound - (log_prior + z), beta=4.0)
        return torch.exp(log_y.clamp(min=_LEAST_LOG_GAP))


@dataclass
class FlexMDMOutput(ModelOutput):
    """What a FlexMDM predicts.

    Attributes:
        logits: [M, V] at the logit rows of a packed call; [B, L, V] of a dense one.
        expected_gaps: float32: [T], the gap before each row, of a packed call; [B, L + 1] of a dense one.
    """

    logits: Tensor | None = None
    expected_gaps: Tensor | None = None


class FlexMDMForMaskedDiffusion(LLaDAPreTrainedModel):
    """A masked-diffusion model that also inserts mask tokens (arXiv 2509.01025)."""

    config_class: type[LLaDAConfig] = FlexMDMConfig
    config: FlexMDMConfig

    def __init__(self, config: FlexMDMConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.schedules = config.schedules
        self.time_conditioning = TimeConditioning(config)
        if config.token_flags:
            self.flag_embedding = ZeroLinear(2, config.d_model, bias=False)
        self.insertion_head = InsertionHead(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *args: Any,
        config: FlexMDMConfig | None = None,
        flexmdm_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a FlexMDM directory or Hub id, or retrofits a plain LLaDA.

        A plain LLaDA (config.json's model_type is llada) gets new modules, freshly drawn from torch's global generator;
        at that point its logits are LLaDA's own. Every other missing, surplus or misshapen tensor is an error.

        Args:
            path: directory in the released layout, or a Hub id.
            flexmdm_config: for a plain LLaDA, fields of FlexMDMConfig that differ from their defaults.

        Raises:
            ValueError: wrong model type, tensors that do not fit, or `flexmdm_config` for what is a FlexMDM already.
        """
        config_dict = read_config(path, kwargs)
        model_type = config_dict.get("model_type")
        if model_type not in (LLaDAConfig.model_type, cls.config_class.model_type):
            raise ValueError(f"{path}: config.json has model_type {model_type!r}, not llada or flexmdm")
        retrofit = model_type == LLaDAConfig.model_type
        if flexmdm_config and not retrofit:
            raise ValueError(f"{path}: is a FlexMDM already; its config.json says what flexmdm_config would")
        if config is None and retrofit:
            config = retrofitted(LLaDAConfig.from_dict(config_dict), **(flexmdm_config or {}))
        config = config or FlexMDMConfig.from_dict(config_dict)
        return cls._load_strictly(path, config, NEW_MODULES if retrofit else (), **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        timesteps: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        open_gaps: Tensor | None = None,
        packed: PackedSequences | None = None,
        logit_rows: Tensor | None = None,
    ) -> FlexMDMOutput:
        """Logits of the masks and expected gaps of x_t.

        Dense call: input_ids int64 [B, L], attention_mask [B, L] (padding on the right), and optionally kept
        bool [B, L] and open_gaps bool [B, L + 1]. The end slots are added here.

        Packed call: `packed` with slots, flags inside it; logits at `logit_rows` int64 [M] (default: the masks).

        Args:
            timesteps: [B], always t in [0, 1]; the model applies alpha.
        """
        if timesteps is None:
            raise ValueError("forward needs timesteps [B]")
        if packed is not None:
            return self._forward_packed(packed, timesteps, logit_rows)
        if input_ids is None:
            raise ValueError("forward needs input_ids or packed")
        lengths, occupied = dense_layout(input_ids, attention_mask)
        packed = add_slots(input_ids, lengths, self.config.pad_token_id, kept=kept, open_gaps=open_gaps)
        is_token = torch.ones_like(packed.tokens, dtype=torch.bool)
        is_token[packed.last_rows] = False
        out = self._forward_packed(packed, timesteps, is_token.nonzero().squeeze(-1))
        assert out.logits is not None and out.expected_gaps is not None
        logits = out.logits.new_zeros(*input_ids.shape, self.config.vocab_size)
        logits[occupied] = out.logits
        gaps = out.expected_gaps.new_zeros(input_ids.shape[0], input_ids.shape[1] + 1)
        gaps[packed.sequence_ids, packed.positions] = out.expected_gaps
        return FlexMDMOutput(logits=logits, expected_gaps=gaps)

    def _forward_packed(self, packed: PackedSequences, timesteps: Tensor, logit_rows: Tensor | None) -> FlexMDMOutput:
        config, sequence = self.config, packed.sequence_ids
        alpha = self.schedules.alpha(timesteps)
        time = alpha if config.time_input == "alpha" else timesteps
        groups = [
            ((1 + scale)[sequence], shift[sequence])
            for scale, shift in self.time_conditioning(config.time_scale * time)
        ]
        modulations = [groups[i // config.time_group_size] for i in range(config.n_layers)]
        hidden = self.model(packed, added=self._embed_flags(packed), modulations=modulations)
        n = config.mean_deletable_tokens
        log_prior = (
            torch.log((1 - alpha) * n / (n * alpha + 1)).float()
            if self.insertion_head.form == "correction"
            else alpha.float()
        )
        gaps = self.insertion_head(hidden, log_prior[sequence])
        rows = mask_rows(packed, config.mask_token_id) if logit_rows is None else logit_rows
        return FlexMDMOutput(logits=self.model.logits(hidden[rows]), expected_gaps=gaps)

    def _embed_flags(self, packed: PackedSequences) -> Tensor | None:
        if not self.config.token_flags or (packed.kept is None and packed.closed is None):
            return None
        none = torch.zeros_like(packed.tokens, dtype=torch.bool)
        flags = torch.stack([none if flag is None else flag for flag in (packed.kept, packed.closed)], dim=-1)
        return self.flag_embedding(flags.to(self.flag_embedding.weight.dtype))

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt | Sequence[int]] | None = None, **settings: Any) -> list[Sample]:
        """Writes a sequence for each prompt (default: one, unprompted): see `sampling.sample_flexmdm`.

        Args:
            prompts: token ids to go on from, or `Prompt`s, which can open other gaps.
        """
        from .sampling import Prompt, sample_flexmdm

        given = [[]] if prompts is None else prompts
        return sample_flexmdm(self, [p if isinstance(p, Prompt) else Prompt(list(p)) for p in given], **settings)


def retrofitted(config: LLaDAConfig, **fields: Any) -> FlexMDMConfig:
    """The configuration of a FlexMDM made of a plain LLaDA; `fields` are those that differ from their defaults."""
    base = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        base.pop(name, None)  # of the base, not of what it becomes
    return FlexMDMConfig(**{**base, **fields})


def add_slots(
    tokens: Tensor, lengths: Tensor, slot: int, *, kept: Tensor | None = None, open_gaps: Tensor | None = None
) -> PackedSequences:
    """Packs right-padded rows and gives each its end slot.

    Args:
        tokens: int64 [B, L]; lengths: int64 [B].
        slot: the token of the slots (the pad id).
        kept: bool [B, L] or None; open_gaps: bool [B, L + 1] or None. If one is given, the other defaults to none kept
            or all open.
    """
    rows = tokens.shape[0]
    padded = F.pad(tokens, (0, 1)).scatter(1, lengths[:, None], slot)
    occupied = torch.arange(padded.shape[1], device=tokens.device) <= lengths[:, None]
    flags: dict[str, Any] = {}
    if kept is not None or open_gaps is not None:
        kept = torch.zeros_like(tokens, dtype=torch.bool) if kept is None else kept.bool()
        end = torch.zeros(rows, 1, dtype=torch.bool, device=tokens.device)
        inside = torch.arange(padded.shape[1], device=tokens.device) < lengths[:, None]
        flags["kept"] = (torch.cat((kept, end), 1) & inside)[occupied]
        flags["closed"] = torch.zeros_like(flags["kept"]) if open_gaps is None else ~open_gaps.bool()[occupied]
    return PackedSequences(padded[occupied], cumulative_lengths(lengths + 1), **flags)
