"""pass@k of graded samples, with bootstrap intervals over problems."""
