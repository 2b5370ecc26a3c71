"""What the LM head and its loss cost: memory by chunk size, the forms that hold no logits, and the peak of a step.

    python -m benchmarks.head chunks     the cross-entropy of given logits: chunk sizes against the plain way
    python -m benchmarks.head forms      head and loss, forward and backward, in each form
    python -m benchmarks.head step       peak memory of one micro-batch of LLaDA-8B, nothing computed (fake tensors)

Peak memory is that of live tensors, by a dispatch mode that sees every operation's results; what a kernel allocates for
itself is not seen. Time is CPU seconds of this process, the least of interleaved repetitions.

The forms: "plain" is PEFT's head and a cross-entropy of float32 logits; "ours" is what training does. Two prototypes
never hold all logits: "torch" calls `torch.nn.functional.linear_cross_entropy`, for LoRA on the widened matrices
[h, u] and [W, B] with u = s A(dropout h), and makes the logits again in its backward; "one pass" forms a chunk's
gradients as soon as it has the chunk's logits, and none for a frozen W.

Shape legend: M masked rows, d width, V vocabulary, r rank, T rows of the blocks.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retrofit.checkpoints.adapters import HEAD, AdapterSettings, inject, select_trainable
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion
from retrofit.flexmdm.packing import PackedSequences
from retrofit.objective import cross_entropy as chunking
from retrofit.objective.cross_entropy import cross_entropy

V_8B = 126_464
RANK = 128
CHUNK_ROWS = 256  # of the forms that never hold all logits


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operations inside the block have made and that are still alive, and their peak."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and (storage := result.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += (size := storage.nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)
        return results

    def _free(self, size: int) -> None:
        self.now -= size


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def consuming(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, consume=True)


# ------------------------------------------------------------------------------------------------------------- chunks


def chunks(rows: Sequence[int], repetitions: int) -> None:
    """Peak, logits included, and time of the cross-entropy alone, forward and backward."""
    weight = torch.randn(V_8B, 8, dtype=torch.bfloat16)
    sizes = [1, 4, 16, 32, 64, 256, 1024]
    ways: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {"plain": (plain_cross_entropy, 1)}
    ways |= {f"{size:,} MiB": (consuming, size) for size in sizes} | {"16 MiB, logits kept": (cross_entropy, 16)}
    for count in rows:
        logits = count * V_8B * 2
        print(f"\n{count:,} rows, V {V_8B:,}, bfloat16: logits {logits / 1e9:.2f} GB")
        print(f"{'float32 at a time':<22}{'peak GB':>9}{'of logits':>11}{'CPU s':>8}")
        hidden = torch.randn(count, 8, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(V_8B, (count,))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        peaks: dict[str, int] = {}
        for repetition in range(repetitions + 1):
            for name, (loss, size) in ways.items():
                chunking.CHUNK_BYTES = size << 20
                with torch.no_grad():
                    made = F.linear(hidden, weight)
                if repetition == 0:
                    del made
                    with LiveTensors([weight, hidden]) as live:
                        loss(F.linear(hidden, weight), targets).sum().backward()
                    peaks[name] = live.peak
                    continue
                began = time.process_time()
                losses = loss(made.requires_grad_(), targets)
                losses.sum().backward()
                seconds[name].append(time.process_time() - began)
        for name in ways:
            print(f"{name:<22}{peaks[name] / 1e9:>9.2f}{peaks[name] / logits:>11.2f}{min(seconds[name]):>8.2f}")


# -------------------------------------------------------------------------------------------------------------- forms


class OnlyHead(nn.Module):
    """An LM head by the name that it has in a model, with LoRA on a frozen weight or trained itself."""

    def __init__(self, width: int, vocabulary: int, *, lora: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = nn.Module()
        head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        self.model.transformer = nn.ModuleDict({"ff_out": head})
        if lora:
            inject(self, AdapterSettings(RANK, RANK, 0.1, (HEAD,)))
            select_trainable(self)
            nn.init.normal_(self.head.lora_B["default"].weight, std=0.02)
        self.product = dict(self.head.lora_variant) if lora else {}

    @property
    def head(self) -> Any:
        return self.get_submodule(HEAD)

    def factors(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(W, u, B) in the dtype of the hidden states; u is [M, 0] and B [V, 0] without LoRA."""
        if not self.product:
            weight = self.head.weight.to(hidden.dtype)
            return weight, hidden[:, :0], weight.detach()[:, :0]
        a, b, dropout = (getattr(self.head, name)["default"] for name in ("lora_A", "lora_B", "lora_dropout"))
        thin = (a(dropout(hidden.to(a.weight.dtype))) * self.head.scaling["default"]).to(hidden.dtype)
        return self.head.base_layer.weight, thin, b.weight.to(hidden.dtype)


class _OnePass(torch.autograd.Function):
    """sum of the rows' losses times their weights; gradients are formed in the forward pass, chunk by chunk.

    A sum over rows, as the gradients of W and B are, can be scaled afterwards only as a whole: hence the weights here.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, thin: Tensor, b: Tensor, targets: Tensor, scale: Tensor
    ) -> Tensor:
        total = scale.new_zeros(())
        d_hidden, d_thin = torch.empty_like(hidden), torch.empty_like(thin)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_b = torch.zeros_like(b, dtype=torch.float32)
        for start in range(0, len(targets), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = (F.linear(hidden[part], weight).addmm_(thin[part], b.t())).float()
            target = targets[part, None]
            top = logits.amax(1, keepdim=True)
            picked = logits.gather(1, target)
            z = logits.sub_(top).exp_().sum(1, keepdim=True)
            total += ((z.log() + top - picked).squeeze(1) * scale[part]).sum()
            logits.div_(z).scatter_add_(1, target, torch.full_like(picked, -1.0)).mul_(scale[part, None])
            gradient = logits.to(hidden.dtype)
            torch.mm(gradient, weight, out=d_hidden[part])
            torch.mm(gradient, b, out=d_thin[part])
            d_b += gradient.t() @ thin[part]
            if d_weight is not None:
                d_weight += gradient.t() @ hidden[part]
        ctx.gradients = [d_hidden, d_weight, d_thin, d_b]
        ctx.dtypes = [hidden.dtype, weight.dtype, thin.dtype, b.dtype]
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def by_logits(only: OnlyHead, hidden: Tensor, targets: Tensor, scale: Tensor, *, ours: bool) -> Tensor:
    """The head is called, and its logits are all there."""
    if only.product:
        only.head.lora_variant.clear()
        only.head.lora_variant.update(only.product if ours else {})
    return ((consuming if ours else plain_cross_entropy)(only.head(hidden), targets) * scale).sum()


def by_torch(only: OnlyHead, hidden: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    weight, thin, b = only.factors(hidden)
    wide = (torch.cat((hidden, thin), 1), torch.cat((weight, b), 1)) if only.product else (hidden, weight)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS)
    return (F.linear_cross_entropy(*wide, targets, reduction="none", options=options).float() * scale).sum()


def by_one_pass(only: OnlyHead, hidden: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    total: Tensor = _OnePass.apply(hidden, *only.factors(hidden), targets, scale)
    return total


Form = Callable[[OnlyHead, Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Form] = {
    "plain": lambda *args: by_logits(*args, ours=False),
    "ours": lambda *args: by_logits(*args, ours=True),
    "torch": by_torch,
    "one pass": by_one_pass,
}


def forms(shapes: Sequence[tuple[int, int, int, torch.dtype, bool]], repetitions: int) -> None:
    """Peak beyond hidden states and weights, and time, of head and loss; and how far the gradients are from plain's."""
    for width, vocabulary, rows, dtype, lora in shapes:
        torch.manual_seed(0)
        # As training has them: a frozen weight in the dtype of the arithmetic, trained ones in float32.
        only = OnlyHead(width, vocabulary, lora=lora, dtype=dtype if lora else torch.float32).train()
        hidden = torch.randn(rows, width).to(dtype).requires_grad_()
        targets, scale = torch.randint(vocabulary, (rows,)), torch.rand(rows) / rows
        weights = "LoRA, W frozen" if lora else "W trained"
        print(f"\nd {width:,}, V {vocabulary:,}, M {rows:,}, {str(dtype)[6:]}, {weights}", end="")
        print(f": logits {rows * vocabulary * dtype.itemsize / 1e9:.3f} GB")
        print(f"{'form':<10}{'peak GB':>9}{'CPU s':>9}{'of plain':>10}{'gradients off by':>18}")
        seconds: dict[str, list[float]] = {name: [] for name in FORMS}
        peaks: dict[str, int] = {}
        plain_gradients: list[Tensor] = []
        off: dict[str, float] = {}
        small = rows * vocabulary < 10**7
        for repetition in range((20 if small else 1) * repetitions + 1):
            for name, form in FORMS.items():
                only.zero_grad()
                hidden.grad = None
                torch.manual_seed(1)  # of dropout
                if repetition == 0:
                    with LiveTensors([hidden, *only.parameters()]) as live:
                        _forward_and_backward(form, only, hidden, targets, scale)
                    peaks[name] = live.peak
                    gradients = [x.grad for x in (hidden, *only.parameters()) if x.grad is not None]
                    plain_gradients = plain_gradients or [gradient.clone() for gradient in gradients]
                    pairs = zip(gradients, plain_gradients, strict=True)
                    off[name] = max(float((one - two).norm() / two.norm()) for one, two in pairs)
                    del gradients, pairs
                else:
                    began = time.process_time()
                    _forward_and_backward(form, only, hidden, targets, scale)
                    seconds[name].append(time.process_time() - began)
        for name in FORMS:
            ratio = min(seconds[name]) / min(seconds["plain"])
            print(f"{name:<10}{peaks[name] / 1e9:>9.3f}{min(seconds[name]):>9.3f}{ratio:>10.2f}{off[name]:>18.1e}")


def _forward_and_backward(form: Form, only: OnlyHead, hidden: Tensor, targets: Tensor, scale: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
        loss = form(only, hidden, targets, scale)
    loss.backward()


# --------------------------------------------------------------------------------------------------------------- step


def step(rows: int) -> None:
    """Peak of one micro-batch of LLaDA-8B, weights left out, with every block recomputed in the backward pass."""
    print(f"\nLLaDA-8B, {rows:,} rows, each block checkpointed, bfloat16; peak GB beyond the weights")
    print(f"{'head':<26}{'LoRA, half masks':>18}{'all masks':>11}{'full, half masks':>19}{'all masks':>11}")
    for name in ("plain", "plain, ours its loss", "ours", "no logits at all"):
        peaks = [_step_peak(name, rows, masks, lora=lora) for lora in (True, False) for masks in (rows // 2, rows)]
        print(f"{name:<26}{peaks[0]:>18.2f}{peaks[1]:>11.2f}{peaks[2]:>19.2f}{peaks[3]:>11.2f}")


def _step_peak(head: str, rows: int, masks: int, *, lora: bool) -> float:
    config = FlexMDMConfig(
        vocab_size=V_8B,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        mlp_hidden_size=12288,
        max_sequence_length=1025,
        mask_token_id=126336,
        pad_token_id=126081,
        eos_token_id=126081,
        time_group_size=8,
        time_hidden_size=16384,
        mean_deletable_tokens=300.0,
    )
    with torch.device("meta"):
        model = FlexMDMForMaskedDiffusion(config).bfloat16()
        if lora:
            inject(model, AdapterSettings(RANK, RANK, 0.1, ("q_proj", "k_proj", "v_proj", HEAD)))
            select_trainable(model)
    if head.startswith("plain") and lora:
        model.get_submodule(HEAD).lora_variant.clear()
    model.gradient_checkpointing_enable()
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    value = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for parameter in model.parameters():
            if parameter.requires_grad:  # reduced over the ranks and let go of, as where all weights are sharded
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        size = 512
        tokens, ends = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows // size + 1, dtype=torch.int32)
        batch = PackedSequences(tokens, ends, host_lengths=(size,) * (rows // size))
        masks = 0 if head == "no logits at all" else masks
        targets = torch.zeros(masks, dtype=torch.int64)
        times = torch.zeros(rows // size, dtype=torch.float64)
        with LiveTensors(list(model.parameters())) as live:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(packed=batch, timesteps=times, logit_rows=targets)
                loss = plain_cross_entropy if head == "plain" else consuming
                total = loss(out.logits, targets).sum() + out.expected_gaps.sum()
                del out
            total.backward()
    return live.peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["chunks", "forms", "step"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.table == "chunks":
        chunks([1000, 2000, 4000], options.repetitions)
    elif options.table == "forms":
        sizes = [(256, 8192, 290, torch.float32), (1024, V_8B, 1024, torch.bfloat16), (1024, V_8B, 512, torch.float32)]
        shapes = [(*size, lora) for size in sizes for lora in (True, False)]
        shapes.append((4096, V_8B, 512, torch.bfloat16, True))  # trained, the forms need more than 13 GB
        forms(shapes, options.repetitions)
    else:
        step(8192)


if __name__ == "__main__":
    main()
