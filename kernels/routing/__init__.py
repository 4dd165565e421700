"""Routing attention: softmax inside clusters of tokens that online k-means finds, beside local heads."""

from kernels.routing.api import RoutingOutput, routing_attention

__all__ = ["RoutingOutput", "routing_attention"]
