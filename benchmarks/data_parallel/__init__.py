"""Claim: ZeRO stages 1 and 2 are faster than DDP on gloo, and use little more memory than the formula."""
