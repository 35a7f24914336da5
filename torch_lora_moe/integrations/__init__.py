"""Bindings to model libraries, one file each; nothing is imported until its file is."""
