"""What a user asked for: the settings language, reading it from YAML, and finding what a name means."""

from fedllm_sec.recipe.sections import Recipe

__all__ = ["Recipe"]
