# SPDX-License-Identifier: Apache-2.0
"""Runs a program around a denoiser, and the transposed program for its gradient."""
