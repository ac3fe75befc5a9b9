"""Models for other runtimes: ONNX Runtime and ExecuTorch; each is verified against PyTorch."""
