"""Metadata lives in pyproject.toml; the package is pure Python, so there is nothing to build here."""

from setuptools import setup

setup()
