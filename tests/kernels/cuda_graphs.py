"""What the GPU tests share: a launch captured in a CUDA graph, which holds only if it never synchronises."""

import math

import torch


def capture_and_replay(launch, *outputs: torch.Tensor) -> torch.cuda.CUDAGraph:
    """Calls `launch` once (which compiles), captures it, poisons the outputs and replays; returns the graph."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for output in outputs:
        output.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return graph
