"""What the tests of `cuda.row` share: specs, and the schedules they get."""

from __future__ import annotations

from kernel_cases import SPECS
from triton_cases import MORE_SPECS

from fxpass.kernels import cuda_schedule
from fxpass.kernels.cuda_source import Schedule
from fxpass.spec import NormSpec

ALL = {name: NormSpec.parse(text) for name, text in {**SPECS, **MORE_SPECS}.items()}
CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}


def scheduled(name: str, hidden: int, rows: int, arch: str = "sm_90") -> Schedule:
    """The schedule of a spec on a GPU."""
    return cuda_schedule.schedule(ALL[name], hidden, rows, CAPABILITIES[arch])
