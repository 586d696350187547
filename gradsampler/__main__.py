# SPDX-License-Identifier: Apache-2.0
"""``python -m gradsampler`` is the command line."""

import sys

from gradsampler.app.cli import main

sys.exit(main())
