"""Measures of a model, an attack and a defense: pure functions of held-out rows and of decisions.

Only they know who is malicious.
"""
