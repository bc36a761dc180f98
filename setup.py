"""Everything about the package is in pyproject.toml; the compiled backends will be built here."""

from setuptools import setup

setup()
