"""fxpass: finds every RMSNorm of a graph and rewrites it, with its rounding kept."""

from __future__ import annotations

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
    "explain",
    "install",
    "last_report",
    "reset_report",
    "rewrite",
    "rmsnorm_backend",
]


def __getattr__(name: str) -> Any:
    # RMSNormPass derives from a class inside Inductor, which costs a second to import.
    if name == "RMSNormPass":
        from fxpass.hooks import pass_class

        return pass_class()
    raise AttributeError(f"module 'fxpass' has no attribute {name!r}")
