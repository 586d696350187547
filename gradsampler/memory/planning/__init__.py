# SPDX-License-Identifier: Apache-2.0
"""Predicts what each memory strategy will take."""
