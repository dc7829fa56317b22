"""Solve dy/dt = f(t, y) and differentiate the solution; knows no flow and no net."""
