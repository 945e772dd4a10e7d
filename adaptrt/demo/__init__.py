"""The main job: meta-train a small few-shot classifier of real handwriting, then adapt it to classes it has never seen.

`digits` draws the episodes, `learner` trains, `measure` says how well and how fast it adapts, `figure` draws that, `run` is the story.
"""
