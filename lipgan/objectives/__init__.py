"""What is minimized: adversarial losses, f-divergences with their bounds, and terms beside them."""

from lipgan.objectives import divergences, losses, regularizers

__all__ = ["divergences", "losses", "regularizers"]
