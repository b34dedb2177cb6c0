"""Measurements of the kernels and of the samplers. Run from the repository; nothing here is installed."""
