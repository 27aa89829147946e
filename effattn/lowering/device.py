"""What differs between devices, as data: device types, and the rates that costs are divided by.

A new device type is a row of ``DEVICE_TYPES``, a new device a row of ``DEVICES``. ``measured`` rows come from this
project's own runs. ``datasheet`` rows combine the vendor's peak figures with shares of peak measured on an H100: good
enough to order forms, not to predict times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["measured", "datasheet", "assumed"]


@dataclass(frozen=True)
class DeviceType:
    """How effattn treats one of torch's device types. A type without a row gets the defaults."""

    name: str  # as in ``torch.device(...).type``
    target: str = "portable"  # default target: a name in ``TARGETS`` of runtime/targets/choice.py
    kernels: Literal["compiled", "interpreted"] | None = None  # how Triton kernels run; None: they do not
    sdpa: Literal["fused", "host"] | None = None  # SDPA kernels that return the LSE: runtime/targets/sdpa.py
    on_host: bool = False  # reading a value needs no synchronisation
    one_generator: bool = False  # one random number generator for all devices of the type
    inner_backend: str = "eager"  # default of ``evaluate``: what compiles the rest of the graph
    dtype: str = "float32"  # default of ``effattn evaluate``: dtype of the weights


# in order of preference for ``effattn evaluate``
_TYPES = (
    DeviceType("cuda", "triton", "compiled", sdpa="fused", inner_backend="inductor", dtype="bfloat16"),
    DeviceType("cpu", kernels="interpreted", sdpa="host", on_host=True, one_generator=True),
    DeviceType("mps", one_generator=True),
)
DEVICE_TYPES: dict[str, DeviceType] = {row.name: row for row in _TYPES}
HOST = next(row.name for row in _TYPES if row.on_host)


def device_type(name: str) -> DeviceType:
    """The row of a device type; the defaults if there is none."""
    return DEVICE_TYPES.get(name) or DeviceType(name)


def on_host(tensor: Any) -> bool:
    """Whether reading values of a tensor needs no synchronisation."""
    return device_type(tensor.device.type).on_host


@dataclass(frozen=True)
class Device:
    """Rates of one kind of device."""

    name: str  # prefix of torch's name of the device
    half: float  # FLOP/s of matrix products in bfloat16 or float16
    single: float  # the same in float32
    bandwidth: float  # bytes/s of device memory
    launch: float  # seconds per kernel launch
    source: Source
    dense: float = 0.75  # share of the matrix rate that SDPA's kernels reach on causal prefill
    generated: float = 0.53  # the same for generated kernels, on the tiles that they visit
    scored: float = 0.35  # the same for the selector's score kernels

    def flops(self, dtype: str) -> float:
        return self.single if dtype in ("float32", "float64") else self.half


# H100: 772 TFLOP/s for 8192-cubed products, 577 for cuDNN's causal attention, 410 for generated kernels on block lists
DEVICES: tuple[Device, ...] = (
    Device("NVIDIA H100", 772e12, 51e12, 3.0e12, 4e-6, "measured"),
    Device("NVIDIA H200", 772e12, 51e12, 4.3e12, 4e-6, "measured"),
    Device("NVIDIA B200", 1800e12, 60e12, 7.0e12, 4e-6, "datasheet", 0.6, 0.35, 0.25),
    Device("NVIDIA A100", 280e12, 19e12, 1.8e12, 5e-6, "datasheet"),
    Device("NVIDIA L40S", 300e12, 80e12, 0.78e12, 4e-6, "datasheet"),
    Device("NVIDIA GeForce RTX 4090", 150e12, 75e12, 0.9e12, 4e-6, "datasheet"),
    Device("AMD Instinct MI300X", 900e12, 120e12, 4.3e12, 8e-6, "datasheet", 0.5, 0.3, 0.2),
)
OTHER_GPU = Device("another GPU", 200e12, 30e12, 1.0e12, 5e-6, "assumed")
CPU = Device("CPU", 0.15e12, 0.15e12, 0.02e12, 1e-5, "assumed", 0.6, 0.5, 0.5)


def device_named(name: str) -> Device:
    """The row for a device name (``torch.cuda.get_device_name()``) or, for the host, for the CPU."""
    if name == HOST:
        return CPU
    return next((device for device in DEVICES if name.startswith(device.name)), OTHER_GPU)
