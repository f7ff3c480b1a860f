"""Who is asked at all: engines that keep failing are ejected, pairs of daemons that do are not paired."""
