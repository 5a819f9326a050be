"""The formulas: a family says what is divided by what, a finish how the result leaves."""

from __future__ import annotations

from fxpass.patterns import finish, l2_norm, rms_norm

FAMILIES = (*rms_norm.FAMILIES, *l2_norm.FAMILIES)
FINISHES = finish.FINISHES
