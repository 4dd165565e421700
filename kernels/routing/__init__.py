"""Routing attention: softmax inside clusters of tokens that online k-means finds, beside local heads."""

from kernels.routing.api import RoutingOutput, preference, routing_attention, select

__all__ = ["RoutingOutput", "preference", "routing_attention", "select"]
