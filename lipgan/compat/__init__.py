"""The functions of other packages, with their signatures, on the metrics of this one.

Switching costs one import: ``from lipgan.compat.pytorch_fid import calculate_frechet_distance``.
"""
