"""One inner step and k of them: what a step computes, and how the user's model, optimiser and data are read and checked."""
