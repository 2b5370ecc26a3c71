"""An accelerate config file against a recipe: what the launched ranks would refuse, found before they are queued."""

from __future__ import annotations

import errno
import importlib.util
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from retrofit.sections import Recipe

from .deepspeed_config import resolve

DEFAULT_PORT = 29500
"""Of `accelerate launch`."""

_KINDS = ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")
# Beside a DeepSpeed JSON accelerate refuses these in its own file, in every rank.
_NOT_BESIDE_JSON = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
)


@dataclass(frozen=True)
class LaunchFile:
    """An accelerate config file.

    Attributes:
        fields: as they stand in the file. processes: over all machines, as the command line or the file says.
    """

    path: Path
    fields: Mapping[str, Any]
    processes: int

    @property
    def machines(self) -> int:
        return int(self.fields.get("num_machines", 1))

    @classmethod
    def read(cls, path: Path, processes: int | None = None) -> LaunchFile:
        """Reads a launch file.

        Args:
            processes: what `accelerate launch --num_processes` is to be given; None: the file's.

        Raises:
            ValueError: it is no accelerate config, or does not say how many processes there are.
            OSError: it cannot be read.
        """
        try:
            reader = YAML(typ="safe", pure=True)
            reader.version = (1, 1)  # as accelerate reads it: `no` without quotes is false
            fields = reader.load(path.read_text(encoding="utf-8"))
        except (YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from error
        if not isinstance(fields, dict) or "distributed_type" not in fields:
            raise ValueError(f"{path}: not an accelerate config: distributed_type is missing (see launch/accelerate/)")
        for name in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
            value = fields.get(name, 1)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{path}: {name}: expected an integer, found {json.dumps(value)}")
        if fields["distributed_type"] is False:
            fields["distributed_type"] = "NO"
        default = 1 if fields["distributed_type"] == "NO" else None
        found = processes if processes is not None else fields.get("num_processes", default)
        if found is None or found < 1:
            raise ValueError(f"{path}: num_processes: is {json.dumps(found)}; give --num_processes N")
        return cls(path, fields, found)

    def check(self, recipe: Recipe, *, goes_on: bool = False) -> None:
        """Refuses a launch that would be refused, or would do something else than it says.

        Args:
            goes_on: a run is to be gone on with: batch sizes that do not fit the processes are then dropped.

        Raises:
            ValueError: one line for each problem.
        """
        problems = [
            *self._own_problems(),
            *self._precision_problems(recipe),
            *self._deepspeed_problems(recipe),
            *self._fsdp_problems(),
        ]
        try:
            recipe.training.check_world_size(self.processes)
        except ValueError as error:
            problems += [] if goes_on else [str(error)]
        if problems:
            raise ValueError("\n".join(problems))

    def deepspeed_config(self, recipe: Recipe) -> dict[str, Any] | None:
        """DeepSpeed's configuration, resolved against the recipe; None where it launches another engine.

        Raises:
            ValueError: it contradicts the recipe, or cannot be read.
        """
        if self.fields["distributed_type"] != "DEEPSPEED":
            return None
        part, file = self._part("deepspeed_config"), self._json()
        if file is None:
            offload = {
                f"offload_{kind}": {"device": part.get(f"offload_{kind}_device", "none")}
                for kind in ("optimizer", "param")
            }
            config = {name: part.get(name, "auto") for name in ("gradient_accumulation_steps", "gradient_clipping")}
            config["zero_optimization"] = {"stage": part.get("zero_stage", 2), **offload}
            return resolve(config, str(self.path), recipe, self.processes)
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise ValueError(f"{file}: not readable as JSON ({error})") from error
        except OSError as error:
            raise ValueError(
                f"{self.path}: deepspeed_config_file: {file}: {error.strerror} (taken from where you launch)"
            ) from error
        return resolve(config, str(file), recipe, self.processes)

    @property
    def replicas(self) -> int:
        """Copies of the model that FSDP2's hybrid sharding keeps."""
        sizes = self._part("parallelism_config") if self.fields["distributed_type"] == "FSDP" else {}
        return int(sizes.get("parallelism_config_dp_replicate_size", 1))

    def check_port(self) -> int:
        """Refuses a port that is taken on this machine; returns the port.

        Raises:
            ValueError: the port and how to choose another.
        """
        port = self.fields.get("main_process_port")
        port = DEFAULT_PORT if port is None else int(port)
        mend = "choose another with --main_process_port N"
        if port == 0 and self.machines > 1:
            raise ValueError(f"{self.path}: main_process_port: is 0, which each machine would choose anew; {mend}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                what = "is in use on this machine" if error.errno == errno.EADDRINUSE else f"cannot be had ({error})"
                raise ValueError(f"{self.path}: main_process_port: port {port} {what}; {mend}") from None
            except OverflowError:
                raise ValueError(f"{self.path}: main_process_port: {port} is no port; {mend}") from None
        return port

    def _own_problems(self) -> list[str]:
        from accelerate.commands.config.config_args import ClusterConfig

        kind, problems = self.fields["distributed_type"], []
        unknown = sorted(set(self.fields) - set(ClusterConfig.__dataclass_fields__))
        if unknown:
            problems.append(f"{self.path}: {', '.join(unknown)}: accelerate does not know this; remove it")
        if kind == "MULTI_CPU":
            problems.append(
                f"{self.path}: distributed_type: MULTI_CPU starts one process instead of {self.processes}; "
                "use MULTI_GPU, for CPUs too (launch/accelerate/ddp.yaml)"
            )
        elif kind not in _KINDS:
            problems.append(
                f"{self.path}: distributed_type: {kind} is not supported; use {', '.join(_KINDS[1:])} or NO"
            )
        elif kind == "NO" and self.processes > 1:
            problems.append(f"{self.path}: distributed_type: NO starts one process instead of {self.processes}")
        if self.machines < 1 or self.processes % self.machines:
            problems.append(
                f"{self.path}: num_processes: {self.processes} over all machines is no multiple of "
                f"num_machines: {self.machines}"
            )
        return problems

    def _precision_problems(self, recipe: Recipe) -> list[str]:
        precision = self.fields.get("mixed_precision")
        if precision is None:
            return []
        bf16 = recipe.training.bf16
        if self._json() is not None:
            return [f"{self.path}: mixed_precision: accelerate refuses it beside a DeepSpeed JSON; remove it"]
        if isinstance(precision, bool):
            return [f'{self.path}: mixed_precision: accelerate fails on no without quotes; write "no"']
        if precision not in ("no", "bf16" if bf16 else "no"):
            return [
                f"{self.path}: mixed_precision: is {precision} and the recipe's training.bf16 is {json.dumps(bf16)}; "
                'set the recipe\'s, and leave the other at "no"'
            ]
        return []

    # ---- DeepSpeed

    def _part(self, name: str) -> Mapping[str, Any]:
        part = self.fields.get(name)
        return part if isinstance(part, Mapping) else {}

    def _json(self) -> Path | None:
        file = self._part("deepspeed_config").get("deepspeed_config_file")
        return Path(file) if isinstance(file, str) and self.fields["distributed_type"] == "DEEPSPEED" else None

    def _deepspeed_problems(self, recipe: Recipe) -> list[str]:
        if self.fields["distributed_type"] != "DEEPSPEED":
            return []
        problems, part, file = [], self._part("deepspeed_config"), self._json()
        if importlib.util.find_spec("deepspeed") is None:
            problems.append(f"{self.path}: package deepspeed is not installed; pip install deepspeed")
        if self.machines > 1 and part.get("deepspeed_multinode_launcher") != "standard":
            problems.append(
                f"{self.path}: deepspeed_multinode_launcher: several machines need standard (others need a host file)"
            )
        both = [name for name in _NOT_BESIDE_JSON if name in part] if file is not None else []
        if both:
            problems.append(f"{self.path}: {', '.join(both)}: accelerate refuses this beside {file}; remove it")
        try:
            self.deepspeed_config(recipe)
        except ValueError as error:
            problems += str(error).splitlines()
        return problems

    # ---- FSDP

    def _fsdp_problems(self) -> list[str]:
        if self.fields["distributed_type"] != "FSDP":
            return []
        problems, part = [], self._part("fsdp_config")
        if part.get("fsdp_version", 1) != 2:
            problems.append(f"{self.path}: fsdp_version: is {part.get('fsdp_version', 1)}; only 2 is supported")
        if part.get("fsdp_offload_params"):
            problems.append(f"{self.path}: fsdp_offload_params: offloading is not supported; remove it")
        sizes = {name.removeprefix("parallelism_config_"): v for name, v in self._part("parallelism_config").items()}
        if sizes:
            data = [sizes.get(name, 1) for name in ("dp_replicate_size", "dp_shard_size")]
            others = [name for name in ("tp_size", "cp_size", "sp_size") if sizes.get(name, 1) != 1]
            if others:
                problems.append(f"{self.path}: {', '.join(others)}: is not supported; remove it")
            if not all(isinstance(size, int) for size in data) or data[0] * data[1] != self.processes:
                problems.append(
                    f"{self.path}: dp_replicate_size: {data[0]} times dp_shard_size: {data[1]} is not the number of "
                    f"processes, {self.processes}"
                )
        return problems
