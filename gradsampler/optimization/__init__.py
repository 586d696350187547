# SPDX-License-Identifier: Apache-2.0
"""Optimisation of the initial noise, its saved state, and regularisers."""
