"""From a recipe to the parts of a run: the plan, which needs no data, then data and model, then the federation."""
