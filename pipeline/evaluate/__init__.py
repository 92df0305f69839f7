"""How good images are: feature networks, exact sums, distances, and what they say about a generation.

Knows images and labels only. Which bucket they come from, and which model made them, is the jobs' affair.
"""
