"""What int8 weights and int8 activations cost in accuracy, beside the int8 of ONNX Runtime."""
