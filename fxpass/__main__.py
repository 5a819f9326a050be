"""`python -m fxpass`."""

from __future__ import annotations

import sys

from fxpass.cli import main

if __name__ == "__main__":
    sys.exit(main())
