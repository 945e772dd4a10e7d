"""The demo: meta-trains a small few-shot classifier of real handwriting, then adapts it to classes that it has never seen.

`digits` draws the episodes, `learner` trains, `measure` measures how well and how fast the model adapts, `figure` draws the results, and
`run` does all of it in order.
"""
