"""Triton kernels.

support.py imports without Triton and determines where the kernels can run.
"""
