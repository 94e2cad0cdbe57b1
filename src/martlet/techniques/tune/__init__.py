"""Training on a task's labels."""
