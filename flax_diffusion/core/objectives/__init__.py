"""What is learnt, in NumPy alone: noise, its schedule, and what the model predicts."""
