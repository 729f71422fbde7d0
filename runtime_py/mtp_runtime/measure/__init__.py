"""Times of passes and rounds, and the comparison of outputs."""
