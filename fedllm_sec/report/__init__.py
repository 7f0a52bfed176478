"""Tables, plots and the page of runs, made from what they left behind: reads `records` and nothing else."""
