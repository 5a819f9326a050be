"""fxpass: finds every RMSNorm of a graph and rewrites it, with its rounding kept."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxpass.backend import rewrite, rmsnorm_backend
from fxpass.capture import explain
from fxpass.errors import FxpassError, OptionsError
from fxpass.hooks import Installed, install
from fxpass.ledger import last_report, reset_report
from fxpass.options import Options
from fxpass.report import Report
from fxpass.sites import Decline
from fxpass.spec import NormSpec

if TYPE_CHECKING:
    from fxpass.invariant.add_norm import add_rms_norm_ as add_rms_norm_
    from fxpass.invariant.mode import batch_invariant_mode as batch_invariant_mode
    from fxpass.invariant.mode import disable as disable_batch_invariant
    from fxpass.invariant.mode import enable as enable_batch_invariant

    RMSNormPass: Any

__version__ = "0.1.0"

__all__ = [
    "Decline",
    "FxpassError",
    "Installed",
    "NormSpec",
    "Options",
    "OptionsError",
    "RMSNormPass",
    "Report",
    "add_rms_norm_",
    "batch_invariant_mode",
    "disable_batch_invariant",
    "enable_batch_invariant",
    "explain",
    "install",
    "last_report",
    "reset_report",
    "rewrite",
    "rmsnorm_backend",
]


_INVARIANT = {
    "add_rms_norm_": ("add_norm", "add_rms_norm_"),
    "batch_invariant_mode": ("mode", "batch_invariant_mode"),
    "disable_batch_invariant": ("mode", "disable"),
    "enable_batch_invariant": ("mode", "enable"),
}
"""Module of fxpass.invariant and name there."""


def __getattr__(name: str) -> Any:
    # RMSNormPass derives from a class inside Inductor, which costs a second to import.
    if name == "RMSNormPass":
        from fxpass.hooks import pass_class

        return pass_class()
    if name in _INVARIANT:  # registers operators
        module, inside = _INVARIANT[name]
        return getattr(import_module(f"fxpass.invariant.{module}"), inside)
    raise AttributeError(f"module 'fxpass' has no attribute {name!r}")
