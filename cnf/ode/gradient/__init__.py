"""How a solution is differentiated: through the solver, from recorded steps, by the adjoint."""
