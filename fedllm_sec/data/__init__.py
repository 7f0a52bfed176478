"""Reading data sets, and dealing their rows to clients."""
