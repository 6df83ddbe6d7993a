"""Many models of one calibration: what their exports have in common, their points, and the whole document."""
