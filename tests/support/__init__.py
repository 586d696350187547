# SPDX-License-Identifier: Apache-2.0
"""What test modules share: problems with known answers, networks, measures."""
