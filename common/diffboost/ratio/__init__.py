"""How many variants a slice are worth making: a search with probes on the inner validation."""
