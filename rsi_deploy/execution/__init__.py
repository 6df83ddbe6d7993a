"""Who computes an export's sites: this process or Ray, with results kept for a run that is resumed."""
