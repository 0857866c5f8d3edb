"""The runs that answer the course's questions, and their report."""
