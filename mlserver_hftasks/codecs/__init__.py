"""V2 tensors to Python values and back. Knows no task and no model."""
