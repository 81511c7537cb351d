"""Checks of what was generated: fidelity to the edges."""
