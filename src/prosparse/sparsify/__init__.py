"""Making Swish models sparse: ProSparse training (arXiv 2402.13516) and threshold control."""
