"""Discernment via contrastive refinement: train, measure and explain less over-refusing models."""

__version__ = "0.1.0"
