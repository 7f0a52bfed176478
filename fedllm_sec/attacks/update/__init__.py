"""Attacks on what is sent: pure functions from what the attackers see to the rows they submit.

Methods: simple, spread, fang, riders, gauge. What they share: sight (what a view shows), weights (what the
server weighs by), search (how strong a rule lets one be), columns and compiled (their numbers in one read).
"""
