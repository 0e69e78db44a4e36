"""Real photos to a trained translator and an honest report, on any machine."""
