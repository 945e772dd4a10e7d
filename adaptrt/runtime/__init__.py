"""Programs for the shapes of the user's data: planned, compiled, run, and differentiated."""
