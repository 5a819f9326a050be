"""Kernels in order of preference, and the public extension point `register`."""

from __future__ import annotations

if __name__ == "fxpass.kernels":
    from fxpass.kernels.contract import Contract, Hidden, Kernel, Layout, Outputs
    from fxpass.kernels.registry import by_name, kernels, register, unregister

    __all__ = [
        "Contract",
        "Hidden",
        "Kernel",
        "Layout",
        "Outputs",
        "by_name",
        "kernels",
        "register",
        "unregister",
    ]
else:
    # From the repository root `import kernels` finds this folder. The name belongs to a PyPI
    # package that transformers and diffusers look for: hand over to it, or look not installed
    # (transformers takes a module without __file__ and __version__ for that).
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _real = PathFinder.find_spec(__name__, [p for p in sys.path if Path(p).resolve() != _root])
    if _real is not None and _real.loader is not None:
        sys.modules[__name__] = module_from_spec(_real)
        _real.loader.exec_module(sys.modules[__name__])
    else:
        del __file__
