# SPDX-License-Identifier: Apache-2.0
"""docs/which-noise.md."""

import rows

from tables.form import markdown, ranged

SOURCES = ("independent", "mixture 0.4", "mixture 0.8", "signed roll", "signs", "sincos")


def noise(columns: dict[str, tuple[str, str]], digits: int = 2) -> str:
    """By source: metrics at places, with the least and the greatest over seeds."""
    found = rows.latest("noise")
    by = {(source, shape, metric): row for (source, shape, metric), row in found.items()}
    return markdown(
        ("noise", *columns),
        (
            (source, *(ranged(by[source, *place], digits) for place in columns.values()))
            for source in SOURCES
        ),
    )


def noise_samples(place: str, data: str) -> str:
    """Are the samples right?"""
    return noise(
        {
            "deviation over data's": (place, "deviation over data's"),
            "spread of energy over data's": (place, "spread of energy over data's"),
            "sliced Wasserstein distance": (place, "sliced Wasserstein distance"),
        }
        | ({"read as their class": (place, "read as their class")} if data == "digits" else {})
        | ({} if data == "digits" else {"kurtosis over data's": (place, "kurtosis over data's")})
    )


def noise_gradients() -> str:
    """Does the gradient reach z0, and does it depend on the draw?"""
    heun, sde = ("gradient digits heun, churn N=50", "gradient digits dpmpp_2m_sde N=50")
    return noise(
        {
            "norm, heun with churn": (heun, "gradient norm"),
            "norm, dpmpp_2m_sde": (sde, "gradient norm"),
            "cosine of two draws, heun with churn": (heun, "cosine over draws"),
            "cosine of two draws, dpmpp_2m_sde": (sde, "cosine over draws"),
        }
    )


def noise_optimisation(solver: str) -> str:
    """Where an optimisation of z0 ends."""
    place = f"optimisation digits {solver} N=20"
    return noise(
        {
            "p(7) in the end": (place, "p(7) after optimisation"),
            "with other noise": (place, "p(7) with other noise"),
            "updates until the loss is 0.1": (place, "updates until the loss is 0.1"),
        }
    )


def noise_correlations() -> str:
    """Of the injected noises."""
    place = "noises 1x8x8 N=50"
    metrics = (
        "correlation with z0",
        "correlation between steps",
        "spread of correlation between steps",
    )
    return noise({metric: (place, metric) for metric in metrics}, 3)


TABLES = {
    "noise-gaussian": lambda: noise_samples("gaussian heun, churn N=50", "gaussian"),
    "noise-digits": lambda: noise_samples("digits heun, churn N=50", "digits"),
    "noise-gradients": noise_gradients,
    "noise-optimisation": lambda: noise_optimisation("heun, churn"),
    "noise-optimisation-ancestral": lambda: noise_optimisation("euler_ancestral"),
    "noise-correlations": noise_correlations,
}
