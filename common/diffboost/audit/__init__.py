"""Audits: fidelity, leaks; what a clinical team checks before it trusts variants."""
