# SPDX-License-Identifier: Apache-2.0
"""What solvers are called elsewhere, for the message that an unknown name gets."""

# By letters and digits alone, without "sample_" before and "Scheduler" behind.
SPELLINGS = {
    # diffusers
    "deismultistep": "deis",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmsolversde": "dpmpp_sde",
    "edmdpmsolvermultistep": "dpmpp_2m",
    "edmeuler": "euler",
    "eulerancestraldiscrete": "euler_ancestral",
    "eulerdiscrete": "euler",
    "flowmatcheulerdiscrete": "euler",
    "flowmatchheundiscrete": "heun",
    "heundiscrete": "heun",
    "kdpm2ancestraldiscrete": "dpm_2_ancestral",
    "kdpm2discrete": "dpm_2",
    "lmsdiscrete": "lms",
    "pndm": "ipndm",
    "unipcmultistep": "uni_pc",
    # web interfaces
    "dpm2": "dpm_2",
    "dpm2a": "dpm_2_ancestral",
    "dpmpp2mkarras": "dpmpp_2m",
    "dpmpp2sa": "dpmpp_2s_ancestral",
    "eulera": "euler_ancestral",
    "plms": "ipndm",
}
