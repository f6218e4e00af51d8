"""Rows from the hub or files, their tokens, and the plan of a step."""
