"""Measuring: peers interleaved in one run, after a correctness gate in the same run.

layers   one linear layer, forward and backward      steps   whole training steps
"""
