"""What a run needs beside its model: device, processes, kernels, optimizer, folder, tracking."""
