"""Small trained models that ship with the package; CARD.md beside this file describes them."""

from gradsampler.models.digits import (
    NULL_CLASS,
    DigitsClassifier,
    DigitsNetwork,
    from_pixels,
    load_classifier,
    load_network,
    to_pixels,
)

__all__ = [
    "NULL_CLASS",
    "DigitsClassifier",
    "DigitsNetwork",
    "from_pixels",
    "load_classifier",
    "load_network",
    "to_pixels",
]
