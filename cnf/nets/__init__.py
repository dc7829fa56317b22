"""Time-conditioned vector fields f(t, x)."""
