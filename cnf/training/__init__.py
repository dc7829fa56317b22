"""Training any module that returns a loss."""
