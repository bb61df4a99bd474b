"""Quantisation schemes, one file each, and the resolution of which scheme stores which weight.

Contract: resolve.py decides from headers and config alone (with headers.py and rules.py, none of
which imports torch); the scheme files turn codes and scales into values and back. No file is read.
"""
