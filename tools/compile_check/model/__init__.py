"""Predicted times of the ops on a GPU that is not there, from machine code, sizes and a few constants.

``trace`` records what an op launches, and counts; ``timing`` turns counts into seconds with the constants
of ``hardware``; a file an op family says what is run and what its limit is; ``document`` writes the page.
"""
