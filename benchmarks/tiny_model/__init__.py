"""Training and scoring of the embedded model, on pictures that are drawn by a program."""
