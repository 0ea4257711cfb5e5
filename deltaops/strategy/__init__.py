"""Deltas chosen as training runs: what watches a run, and what changes its deltas."""
