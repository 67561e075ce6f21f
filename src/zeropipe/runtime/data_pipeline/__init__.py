"""Training on easy samples first: how difficult each sample is (``analyzer``), files of such numbers (``indexed``), and
which samples a step draws (``sampler``)."""
