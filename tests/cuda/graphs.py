"""Steps held in CUDA graphs, for what is tested on a device."""

import torch


def recorded(step):
    """A graph of what a step computes, and the tensors that each replay writes."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    return graph, held
