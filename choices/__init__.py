"""Multiple-choice tasks: their files as pairs to train on and as questions to score."""
