"""The page of a grid: its heat-maps, curves, tables and sentences."""
