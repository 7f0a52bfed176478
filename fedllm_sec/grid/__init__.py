"""Many runs: axes over a base recipe, cells, the workers that run them, the table of results."""
