"""Continuous normalizing flows: densities and samples from one ODE."""
