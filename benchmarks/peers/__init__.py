# SPDX-License-Identifier: Apache-2.0
"""Gradients through a sampling run beside what people use without this package."""
