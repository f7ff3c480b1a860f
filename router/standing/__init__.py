"""Who is asked at all: engines that keep failing are spared, pairs of daemons that do are not paired."""
