# SPDX-License-Identifier: Apache-2.0
"""What a person starts: the command line, the main job and its pictures."""
