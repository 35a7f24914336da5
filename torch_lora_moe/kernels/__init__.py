"""Triton kernels, one file a stage: device code only, launched by ``launch.py``."""
