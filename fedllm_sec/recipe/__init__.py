"""What a user asked for: the settings language, reading it from YAML, and finding what a name means.

sections   every key of a recipe, its type and default
reading    YAML and overrides; what keys alone contradict is refused here
resolve    {name, settings} -> a callable, from a menu or from outside code
shipped    the recipes that come with the package
"""

from fedllm_sec.recipe.sections import Recipe

__all__ = ["Recipe"]
