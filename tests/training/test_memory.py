"""Live bytes, against cases computed by hand: tensors are 100 x 100 float32, 40,000 bytes each, scalars 4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from retrofit.training.memory import LiveBytes, control_group_limits, usable, usable_memory

SIZE = 40_000


@pytest.fixture(params=["real", "fake", "meta"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveBytes]:
    """Entered, over tensors of each kind."""
    with ExitStack() as stack:
        if request.param == "fake":
            stack.enter_context(FakeTensorMode())
        if request.param == "meta":
            stack.enter_context(torch.device("meta"))
        yield stack.enter_context(LiveBytes("meta" if request.param == "meta" else "cpu"))


def chain(x: Tensor) -> Tensor:
    """Three maps, each of which keeps its result for the backward pass."""
    return x.exp().exp().exp()


def test_views_and_writing_in_place_take_no_memory(live: LiveBytes) -> None:
    x = torch.zeros(100, 100)
    rows, same = x[10:20], x.view(-1)
    x.add_(1)
    rows.mul_(2)
    assert live.current == live.peak == SIZE
    del x, rows
    assert live.current == SIZE  # the view keeps all of it
    del same
    assert live.current == 0 and live.peak == SIZE


def test_what_is_made_and_dropped_counts_towards_the_peak_alone(live: LiveBytes) -> None:
    x = torch.zeros(100, 100)
    x = x + 1
    assert (live.current, live.peak) == (SIZE, 2 * SIZE)
    x.resize_(200, 100)
    assert live.current == 2 * SIZE


def test_autograd_keeps_results_and_backward_makes_gradients(live: LiveBytes) -> None:
    x = torch.zeros(100, 100, requires_grad=True)
    loss = chain(x).sum()
    assert live.current == 4 * SIZE + 4  # x, three results, the loss
    loss.backward()
    assert live.current == 2 * SIZE + 4
    # The first gradient beside all results, or the second beside the first and two results; and the loss's own.
    assert live.peak == 5 * SIZE + 8


def test_checkpointing_keeps_the_input_and_its_recomputation_is_seen(live: LiveBytes) -> None:
    x = torch.zeros(100, 100, requires_grad=True)
    loss = checkpoint(chain, x, use_reentrant=False).sum()
    assert live.current == SIZE + 4
    before = live.peak
    loss.backward()
    assert live.current == 2 * SIZE + 4 and before < live.peak == 5 * SIZE + 8


def test_only_what_is_given_or_made_inside_counts_and_only_on_its_device() -> None:
    outside, other = torch.zeros(100, 100), torch.zeros(100, 100)
    with LiveBytes("cpu") as live:
        elsewhere = torch.zeros(1000, 1000, device="meta")
        made = outside.exp()
        assert live.current == SIZE
        assert live.count([outside, other, other, elsewhere]) == 2 * SIZE
        assert live.current == live.peak == 3 * SIZE
        del other
        assert live.current == 2 * SIZE
    del made
    assert live.current == SIZE  # what dies after the block leaves, too
    _ = torch.zeros(100, 100)
    assert live.current == SIZE


# ---------------------------------------------------------------------------------------------------- how much there is


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(text)


def test_the_tightest_control_group_decides_and_cached_files_do_not_count(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/job/step\n")
    group(root / "job/step", memory_max="max\n", memory_current="500\n", memory_stat="inactive_file 0\n")
    group(root / "job", memory_max="1000\n", memory_current="700\n", memory_stat="anon 1\ninactive_file 300\n")
    assert control_group_limits(root, own) == [(1000, 400)]
    own.write_text("4:memory:/old\n3:cpu:/\n")
    statistics = "total_inactive_file 1"
    group(root / "memory/old", memory_limit_in_bytes="9", memory_usage_in_bytes="5", memory_stat=statistics)
    assert control_group_limits(root, own) == [(9, 4)]
    assert control_group_limits(root, tmp_path / "absent") == []


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrofit.training.memory.control_group_limits", lambda: [(600, 100)])
    monkeypatch.setattr(
        "retrofit.training.memory.psutil.virtual_memory", lambda: SimpleNamespace(total=1000, available=900)
    )
    assert usable_memory(torch.device("cpu")) == 500  # free in the group: less than nine tenths of its 600
    assert usable_memory(torch.device("cpu"), 4) == 125
    assert usable(1000) == 900


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_live_bytes_are_what_the_allocator_counts_on_a_gpu() -> None:
    """Up to its rounding of every tensor to 512 bytes."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with LiveBytes("cuda") as live:
        x = torch.zeros(100, 100, requires_grad=True, device="cuda")
        chain(x).sum().backward()
    assert live.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.05)
