"""Plans, compiles, runs and differentiates programs for the shapes of the user's data."""
