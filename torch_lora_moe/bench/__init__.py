"""Measurements: ``python -m torch_lora_moe.bench`` times, ``python -m torch_lora_moe.bench.tune`` picks tiles."""
