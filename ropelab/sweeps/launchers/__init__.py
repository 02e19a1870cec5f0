"""TODO: sweeps.launchers."""
