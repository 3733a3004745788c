"""What is said of a model by running it: scores of pairs, answers, tasks, perplexity, win rates."""
