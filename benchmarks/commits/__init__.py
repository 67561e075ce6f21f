"""Whether a change of the code costs time: two checkouts of zeropipe, step against step in one run."""
