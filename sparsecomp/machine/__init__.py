"""What this machine is and what was measured on it: device, peaks, bounds, timings. Knows no layer."""
