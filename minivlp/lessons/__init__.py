"""The recipes of the lessons: what the notebook trains live and what the recorder runs over many seeds."""
