"""Models: parents that receive built encoders."""
