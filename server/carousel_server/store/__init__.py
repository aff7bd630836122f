"""Where sessions outlive the process that holds them. Knows nothing of gRPC, of models or of what a payload says."""
