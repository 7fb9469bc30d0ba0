"""Where models run and in which number format: chosen by whoever knows the hardware, for one command at a time."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from governance.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_MEND = f"name {', '.join(_STRATEGIES)}, a device such as cuda:0, or a file .json of module name to device"


@dataclass(frozen=True)
class Placement:
    """How models are loaded for a forward pass.

    Attributes:
        device_map: for accelerate: one of its strategies (`auto`), a device such as `cuda:0`, or module name → device;
            None: the CPU.
        dtype: what the weights of checkpoints are converted to; an adapter's factors stay in float32. Statistics and
            gains are summed in float32 or float64 all the same.
    """

    device_map: str | Mapping[str, str | int] | None = None
    dtype: Precision = "float32"

    @property
    def record(self) -> dict[str, Any]:
        """What is recorded beside a result: what differs from float32 on the CPU."""
        told: dict[str, Any] = {} if self.dtype == "float32" else {"dtype": self.dtype}
        return told if self.device_map is None else {**told, "device_map": self.device_map}

    def load(self, path: Path, base: Path | None = None) -> "nn.Module":
        """Load a checkpoint, or an adapter on its base checkpoint, in evaluation mode.

        Raises:
            InputError: accelerate is missing, or a device is.
            CheckpointError, AdapterError: as `algorithms.loading.load_model`.
        """
        import torch

        from algorithms.loading import load_model

        model, _ = load_model(path, base, dtype=getattr(torch, self.dtype), device_map=self.devices())
        if self.device_map in _STRATEGIES:
            for kind in {parameter.device.type for parameter in model.parameters()}:
                _require_run_on(kind)
        return model

    def devices(self) -> str | dict[str, str | int] | None:
        """`device_map`, once accelerate and every device that it names are known to be there.

        Raises:
            InputError: accelerate is missing, or a device is.
        """
        if self.device_map is None:
            return None
        if importlib.util.find_spec("accelerate") is None:
            raise InputError(
                "models are placed by accelerate, which is not installed", "install neuronledger[accelerate]"
            )
        if isinstance(self.device_map, str):
            if self.device_map not in _STRATEGIES:
                _require_device(self.device_map)
            return self.device_map
        for device in dict.fromkeys(self.device_map.values()):
            if device != "disk":
                _require_device(device)
        return dict(self.device_map)


ON_THE_CPU = Placement()
"""In float32."""


def read_placement(device_map: str | None, dtype: Precision) -> Placement:
    """A placement from what the command line says.

    Args:
        device_map: as `Placement.device_map`, or the path of a JSON file with module name → device.
        dtype: as `Placement.dtype`.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    if device_map is None or not device_map.endswith(".json"):
        return Placement(device_map, dtype)
    try:
        found = json.loads(Path(device_map).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{device_map} cannot be read ({error.strerror or error})", _MEND) from error
    except ValueError as error:
        raise InputError(f"{device_map} is not JSON ({error})", _MEND) from error
    if not isinstance(found, dict) or not found or not all(type(device) in (str, int) for device in found.values()):
        raise InputError(f"{device_map} does not hold an object of module name to device", _MEND)
    return Placement(found, dtype)


def _require_device(device: str | int) -> None:
    import torch

    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise InputError(f"there is no device {device} here ({reason})", _MEND) from error
    if kind == "meta":
        raise InputError("the device meta holds no weights", _MEND)
    _require_run_on(kind)


def _require_run_on(kind: str) -> None:
    if kind == "mps":
        raise InputError(
            "models do not run on mps, which has no float64 to sum statistics in", "leave --device-map out"
        )
