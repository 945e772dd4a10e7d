"""One inner step and k of them: what they do, and what of the user's model and optimiser is read, checked or refused."""
