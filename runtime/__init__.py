"""What a run needs beside its model: device, processes, kernels, cache, optimizer, folder."""
