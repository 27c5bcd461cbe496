"""Speed of sparse attention against what people use today; run with `make bench`."""
