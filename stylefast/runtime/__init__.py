"""Rows and plans, the step loop, and the batch planner."""
