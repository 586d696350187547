# SPDX-License-Identifier: Apache-2.0
"""The build; everything about the package itself is in pyproject.toml."""

from setuptools import setup

setup()
