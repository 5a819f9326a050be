"""Formulas of the norm families."""
