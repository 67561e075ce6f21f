"""Claim: zeropipe's pipeline is as fast as the best schedule of torch.distributed.pipelining, and beats DeepSpeed."""
