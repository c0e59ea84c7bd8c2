"""The demo: a small student learns digits from noisy labels and a teacher, with one optimizer per row."""
