"""Plans and CUDA graphs: a step with fixed memory, and its capture."""
