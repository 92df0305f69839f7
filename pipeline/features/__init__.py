"""Feature networks, exact sums of features, and distances between sets of images."""
