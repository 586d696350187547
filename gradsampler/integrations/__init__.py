# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for the samplers of other projects, each imported by its own name."""
