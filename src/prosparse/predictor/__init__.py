"""Activation predictors: what they learn from, how they are trained, calibrated and reported."""
