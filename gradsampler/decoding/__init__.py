# SPDX-License-Identifier: Apache-2.0
"""Decoders in bounded memory."""
